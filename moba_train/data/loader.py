"""Packed rows → this rank's batches for one optimizer step, with a state of one number.

A mix gives one endless stream of rows. A step takes the next ``rows_per_step`` rows of it, whatever the number of
ranks, and each rank takes its slice of those. So the count of rows taken is the whole state, and a run may go on with
another number of ranks. A thread makes the next step's batches while the model computes this one's: a row of 10^6
tokens takes milliseconds from memory, and longer from a disk.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from moba_train.config import MixConfig
from moba_train.data.mix import build_mix
from moba_train.data.pack import Rows, pack
from moba_train.data.store import TokenStore
from moba_train.layers.cross_entropy import IGNORE


@dataclass(frozen=True)
class Batch:
    """B rows of L tokens. A segment is a span of one document in one row; a row's padding is its last segment.

    ``labels`` are in Hugging Face's unshifted convention: equal to ``input_ids``, but -100 at each segment's first
    token (nothing in its segment predicts it) and in padding. ``cu_seqlens`` bounds the segments of the B * L flattened
    tokens and is filled up to a fixed size by repeating B * L.
    """

    input_ids: torch.Tensor  # (B, L) int64
    labels: torch.Tensor  # (B, L) int64
    position_ids: torch.Tensor  # (B, L) int64, 0 at each segment's start
    cu_seqlens: torch.Tensor  # (capacity,) int32
    max_seqlen: int  # a bound, not the longest segment: L

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()


class _Step(NamedTuple):
    """What one rank gets for a step, and what was drawn for all of them."""

    batches: list[Batch]
    drawn: np.ndarray  # (pools,) rows of each, to the end of this step
    padding_share: float  # of this step's tokens


class RowLoader:
    """The batches of one rank. ``rows_per_step`` is over all ranks; ranks of one sequence-parallel group are one here.

    ``waited``: seconds that the last `next_step` had to wait for its batches.
    """

    def __init__(
        self,
        store: TokenStore,
        context_length: int,
        rows_per_step: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        mix: MixConfig | None = None,
    ) -> None:
        if rows_per_step < 1 or rows_per_step % world_size:
            raise ValueError(
                f"{rows_per_step} rows a step cannot be shared by {world_size} ranks; "
                f"make train.tokens_per_step a multiple of {world_size * context_length} (ranks x context length)"
            )
        self.mix = build_mix(store, context_length, seed, mix or MixConfig())
        self.rows_per_step = rows_per_step
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._max_segments = self.mix.rows.max_segments
        self._used = self.mix.rows.used
        self._sources = [source["name"] for source in store.manifest["sources"]]
        self._pool_tokens = self.mix.pool_tokens(store)
        self._rows_taken = 0
        self._thread = ThreadPoolExecutor(1, "rows")  # one: it alone reads the mix, whose caches are not for two
        self._ahead: tuple[tuple[int, int], Future[_Step]] | None = None  # (first row, rows of a micro-batch), its step
        self._last: _Step | None = None
        self.waited = 0.0

    @property
    def epoch(self) -> float:
        """Rows taken over the rows there are: passes over the data, where each source has its natural share."""
        return self._rows_taken / len(self.mix.rows)

    def next_step(self, micro_batch_rows: int) -> list[Batch]:
        """This rank's micro-batches of the next step, each of ``micro_batch_rows`` rows."""
        rank_rows = self.rows_per_step // self._world_size
        if micro_batch_rows < 1 or rank_rows % micro_batch_rows:
            raise ValueError(
                f"{rank_rows} rows of a rank do not make micro-batches of {micro_batch_rows}; make "
                "train.tokens_per_step a multiple of ranks x train.micro_batch_tokens"
            )
        began = time.perf_counter()
        self._last = self._begun(self._rows_taken, micro_batch_rows).result()
        self.waited = time.perf_counter() - began
        self._rows_taken += self.rows_per_step
        self._begun(self._rows_taken, micro_batch_rows)
        return self._last.batches

    def _begun(self, first: int, micro_batch_rows: int) -> Future[_Step]:
        """The step that begins at row ``first``, which the thread has begun or begins now."""
        if self._ahead is None or self._ahead[0] != (first, micro_batch_rows):
            self._ahead = (first, micro_batch_rows), self._thread.submit(self._make_step, first, micro_batch_rows)
        return self._ahead[1]

    def _make_step(self, first: int, micro_batch_rows: int) -> _Step:
        rows = self.mix.draw(first, self.rows_per_step)
        rank_rows = self.rows_per_step // self._world_size
        own = rows[self._rank * rank_rows : (self._rank + 1) * rank_rows]
        return _Step(
            batches=[
                make_batch(self._store, self.mix.rows, own[i : i + micro_batch_rows], self._max_segments)
                for i in range(0, rank_rows, micro_batch_rows)
            ],
            drawn=self.mix.drawn(first + self.rows_per_step).copy(),
            padding_share=1.0 - float(self._used[rows].mean()) / self.mix.rows.context_length,
        )

    def as_row(self) -> dict[str, float]:
        """How often the stage's data was drawn so far, all and by source; each source's share of the document tokens
        drawn; and the padding of the last step. What an unfinished epoch of a pool holds of its sources is taken for
        its average: only the count of rows is known after a resume.
        """
        if self._last is None:
            return {}
        tokens = self._last.drawn / [pool.count for pool in self.mix.pools] @ self._pool_tokens
        there = self._pool_tokens.sum(0)
        drawn = np.flatnonzero(there).tolist()
        return {
            "data/epoch": self.epoch,
            "data/padding": self._last.padding_share,
            **{f"data/epoch/{self._sources[i]}": float(tokens[i] / there[i]) for i in drawn},
            **{f"data/share/{self._sources[i]}": float(tokens[i] / tokens.sum()) for i in drawn},
        }

    def state_dict(self) -> dict[str, int]:
        """The rows that all ranks together have taken, which is the whole state."""
        return {"rows": self._rows_taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._rows_taken = state["rows"]


def heldout_batches(
    store: TokenStore, context_length: int, rows: int, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """The fixed evaluation set: ``rows`` rows of one full-length span each, evenly spread over the documents, one row a
    batch. Every rank gets equally many, the last of some without labels, so that collectives match.
    """
    packed = pack(store.lengths, context_length)
    if not packed.full_rows:
        raise ValueError(
            f"no held-out document reaches the context length {context_length}: the longest has "
            f"{int(store.lengths.max(initial=0))} tokens; hold out longer documents or shorten the context"
        )
    count = min(rows, packed.full_rows)
    chosen = np.arange(count) * packed.full_rows // count
    batches = []
    for i in range(rank, -(-count // world_size) * world_size, world_size):
        batch = make_batch(store, packed, [int(chosen[min(i, count - 1)])], max_segments=1)
        if i >= count:
            batch.labels.fill_(IGNORE)
        batches.append(batch)
    return batches


def make_batch(store: TokenStore, packed: Rows, rows: list[int], max_segments: int) -> Batch:
    """The batch of ``rows``; ``max_segments`` a row fixes the size of ``cu_seqlens``."""
    length = packed.context_length
    total = len(rows) * length
    tokens = np.full(total, store.eos_id, np.int64)
    bounds = [0]
    padding = []
    for i, row in enumerate(rows):
        at = i * length
        for span in range(packed.offsets[row], packed.offsets[row + 1]):
            start, size = packed.starts[span], int(packed.lengths[span])
            tokens[at : at + size] = store.document(packed.documents[span])[start : start + size]
            at += size
            bounds.append(at)
        end = (i + 1) * length
        if at < end:
            padding.append(slice(at, end))
            bounds.append(end)

    if (largest := tokens.max()) >= store.vocab_size:  # none was written: on a GPU it would end the run without a word
        raise ValueError(
            f"{store.path} holds the token id {largest}, in a vocabulary of {store.vocab_size}: its files were changed "
            f"since it was made; delete it and prepare it again"
        )
    cu_seqlens = np.full(len(rows) * max_segments + 1, total, np.int32)
    cu_seqlens[: len(bounds)] = bounds
    starts = np.array(bounds[:-1])
    positions = np.arange(total) - np.repeat(starts, np.diff(bounds))
    labels = tokens.copy()
    labels[starts] = IGNORE
    for pad in padding:
        labels[pad] = IGNORE
    shape = (len(rows), length)
    return Batch(
        input_ids=torch.from_numpy(tokens).view(shape),
        labels=torch.from_numpy(labels).view(shape),
        position_ids=torch.from_numpy(positions).view(shape),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=length,
    )
