"""What a token store holds, and what a stage will draw from it, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moba_train.data.mix import Mix
from moba_train.data.store import TokenStore

LONG = (8 << 10, 32 << 10, 128 << 10, 1 << 20)  # tokens: lengths that count as long, in the eyes of different readers


@dataclass(frozen=True)
class Holding:
    """The documents of one source, or of all."""

    name: str
    documents: int
    tokens: int
    median: int  # tokens of a document
    longest: int  # tokens
    long_shares: tuple[float, ...]  # of the tokens: in documents of at least LONG[i] tokens
    documents_by_bin: np.ndarray  # (bins,) bin i: documents of 2**i to below 2**(i + 1) tokens
    tokens_by_bin: np.ndarray  # (bins,)


@dataclass(frozen=True)
class SourceDraw:
    """What a stage draws of one source."""

    name: str
    tokens: float
    share: float  # of the document tokens drawn
    epochs: float  # tokens drawn over those that the mix may draw


def holdings(store: TokenStore) -> list[Holding]:
    """One a source, in the store's order, and last that of all of them together where there are several."""
    names = [source["name"] for source in store.manifest["sources"]]
    bins = int(store.lengths.max(initial=1)).bit_length()
    found = [_holding(name, store.lengths[store.sources == index], bins) for index, name in enumerate(names)]
    return found if len(found) == 1 else [*found, _holding("all", store.lengths, bins)]


def _holding(name: str, lengths: np.ndarray, bins: int) -> Holding:
    tokens = int(lengths.sum())
    of_bin = np.searchsorted(2 ** np.arange(1, bins), lengths, side="right")
    return Holding(
        name=name,
        documents=len(lengths),
        tokens=tokens,
        median=int(np.median(lengths)) if len(lengths) else 0,
        longest=int(lengths.max(initial=0)),
        long_shares=tuple(int(lengths[lengths >= least].sum()) / max(1, tokens) for least in LONG),
        documents_by_bin=np.bincount(of_bin, minlength=bins),
        tokens_by_bin=np.bincount(of_bin, lengths, minlength=bins).astype(np.int64),
    )


def source_draws(store: TokenStore, mix: Mix, rows: int) -> Sequence[SourceDraw]:
    """What ``rows`` rows of a mix hold of each source that it draws from, in the store's order."""
    per_row = mix.tokens_by_source(store)
    there = mix.pool_tokens(store).sum(0)
    return [
        SourceDraw(
            name=store.manifest["sources"][index]["name"],
            tokens=rows * per_row[index],
            share=per_row[index] / per_row.sum(),
            epochs=rows * per_row[index] / there[index],
        )
        for index in np.flatnonzero(per_row)
    ]


def describe_draws(draws: Sequence[SourceDraw]) -> str:
    """``code 30 % (0.4 epochs), books 70 % (1.2 epochs)``."""
    return ", ".join(f"{draw.name} {100 * draw.share:.0f} % ({draw.epochs:.2g} epochs)" for draw in draws)
