"""Which rows a stage draws: every document once an epoch, or more of some sources and lengths than of others.

The documents of a mix fall into pools by source and length, each packed into rows of its own. A pool's rows are an
endless stream, in a new order each of its epochs, and the streams are interleaved by a fixed sequence: row n comes from
the pool in whose part of [0, 1) the fractional part of n times the golden ratio lies (a Kronecker sequence, of all the
most even one). So the first n rows hold n times a pool's share of its rows, to within a few, and n alone is the state.

Weighting lengths within each source, so that the sources' proportions stay, follows Fu et al. 2024 (arXiv:2402.10171).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from moba_train.config import Config, MixConfig
from moba_train.data.pack import Rows, join, pack
from moba_train.data.store import TokenStore

_GOLDEN = np.uint64(11400714819323198485)  # 2**64 over the golden ratio
_COUNTED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Pool:
    """Rows ``first`` to ``first + count`` of a mix, drawn alike."""

    first: int
    count: int
    share: float  # of the rows drawn


class Mix:
    """The rows of all pools, and which of them is drawn n-th. ``seed`` orders the rows of each epoch of a pool."""

    def __init__(self, rows: Rows, pools: list[Pool], seed: int) -> None:
        self.rows = rows
        self.pools = pools
        self._seed = seed
        bounds = np.cumsum([pool.share for pool in pools])[:-1]
        self._bounds = np.array([min(int(2**64 * bound), 2**64 - 1) for bound in bounds], np.uint64)
        self._orders: list[tuple[int, np.ndarray]] = [(-1, np.empty(0, np.int64))] * len(pools)  # epoch, its order
        self._counted = 0  # draws before this one are in _drawn
        self._drawn = np.zeros(len(pools), np.int64)

    def draw(self, first: int, count: int) -> list[int]:
        """The rows of draws ``first`` to ``first + count``. Quick where ``first`` does not fall."""
        drawn = self.drawn(first).copy()
        rows = []
        for number in self._pool_of(first, first + count).tolist():
            rows.append(self._row(number, int(drawn[number])))
            drawn[number] += 1
        return rows

    def drawn(self, draws: int) -> np.ndarray:
        """(pools,) how many of the first ``draws`` rows are each pool's."""
        if draws < self._counted:
            self._counted, self._drawn = 0, np.zeros_like(self._drawn)
        while self._counted < draws:
            stop = min(draws, self._counted + _COUNTED_AT_ONCE)
            self._drawn += np.bincount(self._pool_of(self._counted, stop), minlength=len(self.pools))
            self._counted = stop
        return self._drawn

    def _pool_of(self, first: int, stop: int) -> np.ndarray:
        return np.searchsorted(self._bounds, np.arange(first, stop, dtype=np.uint64) * _GOLDEN, side="right")

    def _row(self, number: int, position: int) -> int:
        pool = self.pools[number]
        epoch, index = divmod(position, pool.count)
        if self._orders[number][0] != epoch:
            generator = np.random.default_rng([self._seed, epoch, number])
            self._orders[number] = epoch, generator.permutation(pool.count)
        return pool.first + int(self._orders[number][1][index])

    @property
    def padding_share(self) -> float:
        """Pad tokens over all tokens drawn."""
        return 1.0 - self._mean(self.rows.used / self.rows.context_length)

    @property
    def full_share(self) -> float:
        """Rows that are one full-length segment over all rows drawn: the only ones that the trailing loss counts."""
        return self._mean(self.rows.is_full)

    def tokens_by_source(self, store: TokenStore) -> np.ndarray:
        """(sources,) document tokens of each of the store's sources in one row, on average over the draws."""
        return np.array([pool.share / pool.count for pool in self.pools]) @ self.pool_tokens(store)

    def pool_tokens(self, store: TokenStore) -> np.ndarray:
        """(pools, sources) document tokens of each of the store's sources in each pool."""
        pool_of_row = np.repeat(np.arange(len(self.pools)), [pool.count for pool in self.pools])
        pool_of_span = np.repeat(pool_of_row, np.diff(self.rows.offsets))
        sources = len(store.manifest["sources"])
        index = pool_of_span * sources + store.sources[self.rows.documents]
        tokens = np.bincount(index, self.rows.lengths, minlength=len(self.pools) * sources)
        return tokens.reshape(len(self.pools), sources)

    def _mean(self, of_row: np.ndarray) -> float:
        return sum(pool.share * float(of_row[pool.first : pool.first + pool.count].mean()) for pool in self.pools)


def check_mix(config: MixConfig, sources: Iterable[str], key: str) -> None:
    """
    Raises:
        ValueError: a setting out of range or a weight for a source that does not exist; names ``key``'s field.
    """
    names = sorted(set(sources))
    for name, weight in config.weights.items():
        if name not in names:
            raise ValueError(f"{key}.weights names {name!r}, no source of the data: choose from {', '.join(names)}")
        _check_weight(f"{key}.weights.{name}", weight)
    if config.weights and not any(config.weights.values()):
        raise ValueError(f"{key}.weights are all 0: give a source a share above 0")
    for length, weight in config.length_weights.items():
        if length < 1:
            raise ValueError(f"{key}.length_weights has a length of {length} tokens: must be at least 1")
        _check_weight(f"{key}.length_weights.{length}", weight)
    if config.min_length < 1:
        raise ValueError(f"{key}.min_length={config.min_length}: must be at least 1 token")
    if not 0 < config.most_padding <= 1:
        raise ValueError(f"{key}.most_padding={config.most_padding}: must be above 0, up to 1 (documents stay whole)")
    if config.full_rows is not None and not 0 <= config.full_rows <= 1:
        raise ValueError(f"{key}.full_rows={config.full_rows}: must be from 0 to 1, a share of the rows")


def _check_weight(key: str, weight: float) -> None:
    if not 0 <= weight < math.inf:
        raise ValueError(f"{key}={weight}: must be a finite number, at least 0")


def stage_mix(config: Config, index: int) -> tuple[MixConfig, str]:
    """The mix of a stage, its own or that of the data, and what messages call it."""
    own = config.schedule.stages[index].mix
    return (config.data.mix, "data.mix") if own is None else (own, f"schedule.stages[{index}].mix")


def build_mix(store: TokenStore, context_length: int, seed: int, config: MixConfig, key: str = "data.mix") -> Mix:
    """The mix of a stage at its context length. ``key`` is what messages call ``config``.

    Raises:
        ValueError: a setting that `check_mix` refuses, a source without a document to draw, or a share of full rows
            that its documents cannot give.
    """
    names = [source["name"] for source in store.manifest["sources"]]
    check_mix(config, names, key)
    # Without weights all sources are one group, whose documents are alike whatever source they are from.
    weights = {name: weight for name, weight in config.weights.items() if weight} or {"": 1.0}
    parts: list[_Part] = []
    for group, weight in weights.items():
        of_group = []
        for documents, of_token in _choose(store, names, group, config):
            rows = pack(store.lengths[documents], context_length, seed, config.most_padding).renamed(documents)
            if len(rows):
                of_group.append(_Part(rows, of_token, group, weight / sum(weights.values())))
        if not of_group:
            raise ValueError(
                f"{key} leaves no document of {f'source {group!r}' if group else 'the data'} to draw: lower min_length="
                f"{config.min_length}, or raise a weight that is 0"
            )
        parts += of_group
    if config.full_rows is not None:
        parts = [piece for part in parts for piece in part.split()]
        _set_full_share(parts, config.full_rows, key, context_length)
    shares = _row_shares(parts)
    kept = [(part, share) for part, share in zip(parts, shares, strict=True) if share]
    firsts = np.cumsum([0, *(len(part.rows) for part, _ in kept)])
    pools = [Pool(int(firsts[i]), len(part.rows), float(share)) for i, (part, share) in enumerate(kept)]
    return Mix(join([part.rows for part, _ in kept]), pools, seed)


@dataclass
class _Part:
    """The rows of a pool to be, and what its share follows from."""

    rows: Rows
    weight: float  # of a token of it, against others of its group
    group: str
    group_weight: float  # share of all tokens

    @property
    def tokens(self) -> int:
        return int(self.rows.lengths.sum())

    @property
    def full(self) -> bool:
        return self.rows.full_rows == len(self.rows)

    def split(self) -> list[_Part]:
        """Its full rows, and the others."""
        at, end = self.rows.full_rows, len(self.rows)
        return [replace(self, rows=self.rows.slice(a, b)) for a, b in ((0, at), (at, end)) if a < b]


def _choose(store: TokenStore, names: list[str], group: str, config: MixConfig) -> Iterable[tuple[np.ndarray, float]]:
    """The documents of each part of a group, by the length classes, and the weight of their tokens."""
    of_group = np.array([not group or name == group for name in names])[store.sources]
    bounds = [0, *sorted(config.length_weights)]
    for at, least in enumerate(bounds):
        weight = config.length_weights[least] if least else 1.0
        below = bounds[at + 1] if at + 1 < len(bounds) else np.iinfo(np.int64).max
        chosen = of_group & (store.lengths >= max(least, config.min_length)) & (store.lengths < below)
        if weight:
            yield np.flatnonzero(chosen), weight


def _row_shares(parts: list[_Part], of_full: float = 1.0) -> np.ndarray:
    """(parts,) share of the rows drawn, where full rows weigh ``of_full`` times what they do by their tokens."""
    tokens = np.array([part.weight * part.tokens * (of_full if part.full else 1.0) for part in parts])
    groups = np.array([part.group for part in parts])
    totals = np.array([tokens[groups == part.group].sum() for part in parts])
    tokens = np.array([part.group_weight for part in parts]) * tokens / totals
    rows = tokens / [part.tokens / len(part.rows) for part in parts]
    return rows / rows.sum()


def _set_full_share(parts: list[_Part], wanted: float, key: str, context_length: int) -> None:
    """Weigh full rows against the others alike in every group, so that ``wanted`` of all rows drawn are full."""
    full = np.array([part.full for part in parts])

    def share(of_full: float) -> float:
        return float(_row_shares(parts, of_full)[full].sum())

    # Some group may have full rows only, or none: what the others can give has bounds.
    lowest, highest = share(2.0**-80), share(2.0**80)
    if not lowest - 1e-9 <= wanted <= highest + 1e-9:
        raise ValueError(
            f"{key}.full_rows={wanted}: at context_length={context_length} the documents allow {lowest:.3f} to "
            f"{highest:.3f}; choose a share in between, or other weights"
        )
    if wanted in (0.0, 1.0):
        of_full = math.inf if wanted else 0.0
    else:
        of_full = 2.0 ** _bisect(lambda exponent: share(2.0**exponent) < wanted, -80.0, 80.0)
    for part in parts:
        if of_full in (0.0, math.inf):
            part.weight *= float(part.full == bool(of_full))
        elif part.full:
            part.weight *= of_full


def _bisect(below: Callable[[float], bool], low: float, high: float) -> float:
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return low
