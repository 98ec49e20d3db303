"""Mixes: the shares that were asked for, each source in epochs of its own, and the natural case as without a mix."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moba_train.config import MixConfig
from moba_train.data.loader import RowLoader
from moba_train.data.mix import Mix, build_mix, check_mix
from moba_train.data.pack import pack
from moba_train.data.store import StoreWriter, TokenStore

EOS = 0
SOURCES = ("books", "code", "notes")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Three sources: 20 long documents, 30 of all lengths, 100 short ones. No token is there twice."""
    path = tmp_path_factory.mktemp("mix") / "store"
    writer = StoreWriter(path, vocab_size=1 << 20, shard_bytes=1 << 20)
    draw = np.random.default_rng(0)
    first = 1
    for source, lengths in enumerate(
        [draw.integers(300, 900, 20), draw.integers(1, 400, 30), draw.integers(1, 60, 100)]
    ):
        for length in lengths:
            writer.add([np.arange(first, first + length, dtype=np.uint32)], source)
            first += int(length)
    writer.close_shard({})
    writer.finish({"eos_id": EOS, "sources": [{"name": name} for name in SOURCES]})
    return TokenStore.open(path)


def spans(mix: Mix, row: int) -> list[tuple[int, int, int]]:
    """(document, start, length) of each span of a row."""
    at = slice(mix.rows.offsets[row], mix.rows.offsets[row + 1])
    parts = (mix.rows.documents[at], mix.rows.starts[at], mix.rows.lengths[at])
    return list(zip(*(part.tolist() for part in parts), strict=True))


def shares(mix: Mix, store: TokenStore, rows: int = 5000) -> dict[str, float]:
    """Each source's share of the document tokens in the first ``rows`` rows drawn."""
    count: Counter[str] = Counter()
    for row in mix.draw(0, rows):
        for document, _, length in spans(mix, row):
            count[SOURCES[store.sources[document]]] += length
    return {name: count[name] / count.total() for name in SOURCES}


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 400), st.integers(0, 2**33), st.integers(0, 3))
def test_without_settings_every_row_once_an_epoch(store: TokenStore, context: int, seed: int, epoch: int) -> None:
    mix = build_mix(store, context, seed, MixConfig())
    rows = pack(store.lengths, context, seed, most_padding=0.01)
    assert len(mix.pools) == 1
    for name in ("offsets", "documents", "starts", "lengths"):
        assert (getattr(mix.rows, name) == getattr(rows, name)).all()
    order = np.random.default_rng([seed, epoch]).permutation(len(rows))
    assert mix.draw(epoch * len(rows), len(rows)) == order.tolist()
    assert mix.full_share == pytest.approx(rows.full_rows / len(rows))
    assert mix.padding_share == pytest.approx(1 - rows.used.mean() / context)


@settings(max_examples=30, deadline=None)
@given(
    st.fixed_dictionaries({name: st.floats(0.05, 5) for name in SOURCES}),
    st.dictionaries(st.integers(1, 500), st.floats(0.1, 8), max_size=2),
    st.integers(8, 200),
)
def test_shares_of_tokens(store: TokenStore, weights: dict[str, float], by_length: dict[int, float], context: int):
    mix = build_mix(store, context, 1, MixConfig(weights=weights, length_weights=by_length))
    total = sum(weights.values())
    found = shares(mix, store)
    expected = mix.tokens_by_source(store)
    for index, name in enumerate(SOURCES):
        assert found[name] == pytest.approx(weights[name] / total, abs=0.01)
        assert expected[index] / expected.sum() == pytest.approx(weights[name] / total)
    assert sum(pool.share for pool in mix.pools) == pytest.approx(1)
    assert expected.sum() == pytest.approx(context * (1 - mix.padding_share))


def test_the_loader_tells_epochs_and_shares_by_source(store: TokenStore) -> None:
    """Equal to a count of the tokens drawn, to within an epoch's edge."""
    mix = MixConfig(weights={"books": 3, "notes": 1}, length_weights={20: 2})
    loader = RowLoader(store, 32, rows_per_step=8, mix=mix)
    for _ in range(500):
        loader.next_step(8)
    row = loader.as_row()
    again = build_mix(store, 32, 0, mix)  # the loader's own is its thread's
    found = shares(again, store, rows=4000)
    there = {name: int(store.lengths[store.sources == SOURCES.index(name)].sum()) for name in mix.weights}
    drawn = sum(length for one in again.draw(0, 4000) for _, _, length in spans(again, one))
    for name in mix.weights:
        assert row[f"data/share/{name}"] == pytest.approx(found[name], abs=0.01)
        assert row[f"data/epoch/{name}"] == pytest.approx(found[name] * drawn / there[name], rel=0.02)
    assert "data/epoch/code" not in row


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 20_000), st.integers(1, 64), st.lists(st.floats(0.01, 1), min_size=1, max_size=3))
def test_even_at_any_point(store: TokenStore, first: int, count: int, weights: list[float]) -> None:
    """However many rows are drawn, and from wherever: each pool's count is its share to within a few rows."""
    config = MixConfig(weights=dict(zip(SOURCES, weights, strict=False)))
    mix = build_mix(store, 64, 0, config)
    for draws in (first, first + count):
        for drawn, pool in zip(mix.drawn(draws), mix.pools, strict=True):
            assert abs(drawn - draws * pool.share) < 5
    fresh = build_mix(store, 64, 0, config)
    assert fresh.draw(first, count) == mix.draw(first, count)
    assert [row for n in range(count) for row in fresh.draw(first + n, 1)] == mix.draw(first, count)


@settings(max_examples=20, deadline=None)
@given(
    st.dictionaries(st.sampled_from(SOURCES), st.floats(0.1, 3), max_size=3),
    st.dictionaries(st.integers(1, 500), st.floats(0.2, 4), max_size=2),
    st.integers(1, 80),
    st.integers(4, 300),
)
def test_a_pool_repeats_no_token_before_all_were_seen(
    store: TokenStore, weights: dict[str, float], by_length: dict[int, float], least: int, context: int
) -> None:
    """Every epoch of a pool holds every token of its documents once; no document is in two pools."""
    config = MixConfig(weights, by_length, min_length=min(least, 40))
    mix = build_mix(store, context, 3, config)
    drawn: list[list[int]] = [[] for _ in mix.pools]
    of_pool = np.repeat(np.arange(len(mix.pools)), [pool.count for pool in mix.pools])
    needed = max(int(np.ceil((2 * pool.count + 6) / pool.share)) for pool in mix.pools)
    if needed > 20_000:
        return  # a share near 0
    for row in mix.draw(0, needed):
        drawn[of_pool[row]].append(row)
    documents = [set(mix.rows.documents[slice(*mix.rows.offsets[[p.first, p.first + p.count]])]) for p in mix.pools]
    assert sum(map(len, documents)) == len(set().union(*documents))
    for pool, rows in zip(mix.pools, drawn, strict=True):
        for epoch in range(2):
            of_epoch = rows[epoch * pool.count : (epoch + 1) * pool.count]
            assert sorted(of_epoch) == list(range(pool.first, pool.first + pool.count))
    covered = np.zeros(len(store), np.int64)
    np.add.at(covered, mix.rows.documents, mix.rows.lengths)
    assert all(covered[document] in (0, length) for document, length in enumerate(store.lengths))
    assert store.lengths[covered > 0].min() >= config.min_length


def test_epochs_of_a_pool_have_orders_of_their_own(store: TokenStore) -> None:
    mix = build_mix(store, 32, 0, MixConfig(weights={"books": 1, "code": 1}))
    of_books = [row for row in mix.draw(0, 2000) if row < mix.pools[0].count]
    count = mix.pools[0].count
    first, second = of_books[:count], of_books[count : 2 * count]
    assert sorted(first) == sorted(second) and first != second


def test_lengths_are_weighted_within_a_source(store: TokenStore) -> None:
    """A token of a document of 200 or more comes three times as often as another of the same source."""
    mix = build_mix(store, 50, 0, MixConfig(weights={"code": 2, "books": 1}, length_weights={200: 3}))
    seen = np.zeros(len(store))
    for row in mix.draw(0, 20_000):
        for document, _, length in spans(mix, row):
            seen[document] += length
    rate = seen / store.lengths
    code = store.sources == 1
    long, short = rate[code & (store.lengths >= 200)], rate[code & (store.lengths < 200)]
    assert long.mean() / short.mean() == pytest.approx(3, rel=0.03)
    assert not seen[store.sources == 2].any()


@pytest.mark.parametrize("full_rows", [None, 0.3])
def test_each_length_class_has_its_own_weight(store: TokenStore, full_rows: float | None) -> None:
    """A document of just a class's length belongs to it. Beside them, full rows have a weight of their own."""
    bounds = np.sort(store.lengths[store.sources == 1])[[10, 20]].tolist()
    weights = {bounds[0]: 4.0, bounds[1]: 0.5}
    mix = build_mix(store, 50, 0, MixConfig(weights={"code": 1.0}, length_weights=weights, full_rows=full_rows))
    classes = np.searchsorted(bounds, store.lengths, side="right")
    rates: dict[tuple[int, bool], float] = {}
    covered = np.zeros(len(store), np.int64)
    for pool in mix.pools:
        rows = range(pool.first, pool.first + pool.count)
        there = [span for row in rows for span in spans(mix, row)]
        (length_class,) = {classes[document] for document, _, _ in there}
        full = full_rows is not None and bool(mix.rows.is_full[pool.first])
        rates[length_class, full] = pool.share / pool.count
        np.add.at(covered, [document for document, _, _ in there], [length for _, _, length in there])
    assert (covered == np.where(store.sources == 1, store.lengths, 0)).all()
    for full in {full for _, full in rates}:
        found = {length_class: rate for (length_class, its_own), rate in rates.items() if its_own is full}
        assert {c: rate / found[2] for c, rate in found.items()} == pytest.approx(
            {c: (1.0, 4.0, 0.5)[c] / 0.5 for c in found}, rel=0.1
        )  # a class's last row is not full
    if full_rows is not None:
        assert mix.full_share == pytest.approx(full_rows, abs=1e-6)


@pytest.mark.parametrize("weights", [{}, {"books": 0.5, "code": 0.5}, {"books": 0.8, "notes": 0.2}], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
def test_share_of_full_rows(store: TokenStore, weights: dict[str, float], share: float) -> None:
    config = MixConfig(weights=weights, full_rows=share)
    mix = build_mix(store, 80, 0, config)
    drawn = mix.rows.is_full[mix.draw(0, 4000)]
    assert drawn.mean() == pytest.approx(share, abs=0.002)
    assert mix.full_share == pytest.approx(share, abs=1e-6)
    if weights:  # the sources keep theirs
        assert shares(mix, store) == pytest.approx({name: 0.0 for name in SOURCES} | weights, abs=0.01)


def test_full_rows_only(store: TokenStore) -> None:
    mix = build_mix(store, 80, 0, MixConfig(full_rows=1.0))
    assert mix.rows.is_full.all() and mix.padding_share == 0
    assert len(mix.rows) == (store.lengths // 80).sum()
    assert build_mix(store, 80, 0, MixConfig(full_rows=0.0)).full_share == 0


def test_weights_far_apart(store: TokenStore) -> None:
    """A share too small for the arithmetic of the draws is drawn (almost) never, and nothing overflows."""
    mix = build_mix(store, 64, 0, MixConfig(weights={"books": 1.0, "code": 1e-30}))
    assert mix.drawn(100_000)[0] >= 99_999
    assert mix.draw(0, 3) == mix.draw(0, 3)


def test_loader_with_a_mix(store: TokenStore) -> None:
    """The same rows for any number of ranks, and after a resume at another."""
    config = MixConfig(weights={"books": 0.7, "notes": 0.3}, full_rows=0.5)
    alone = RowLoader(store, 64, 8, seed=3, mix=config)
    ranks = [RowLoader(store, 64, 8, rank, 4, seed=3, mix=config) for rank in range(4)]
    for _ in range(40):
        expected = np.concatenate([batch.input_ids for batch in alone.next_step(4)])
        assert (np.concatenate([b.input_ids for rank in ranks for b in rank.next_step(2)]) == expected).all()
    resumed = RowLoader(store, 64, 8, seed=3, mix=config)
    resumed.load_state_dict(ranks[1].state_dict())
    assert (resumed.next_step(8)[0].input_ids == alone.next_step(8)[0].input_ids).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"bokos": 1.0}}, "names 'bokos', no source of the data: choose from books, code, notes"),
        ({"weights": {"books": -1.0}}, r"weights\.books=-1\.0: must be a finite number, at least 0"),
        ({"weights": {"books": float("nan")}}, r"weights\.books=nan: must be a finite number"),
        ({"weights": {"books": 0.0}}, "weights are all 0"),
        ({"length_weights": {0: 2.0}}, "a length of 0 tokens"),
        ({"length_weights": {9: float("inf")}}, r"length_weights\.9=inf"),
        ({"min_length": 0}, r"min_length=0: must be at least 1"),
        ({"min_length": 10_000}, r"leaves no document of the data to draw: lower min_length=10000"),
        ({"min_length": 100, "weights": {"notes": 1.0}}, "leaves no document of source 'notes' to draw"),
        ({"most_padding": 0.0}, r"most_padding=0\.0: must be above 0, up to 1"),
        ({"most_padding": 1.5}, r"most_padding=1\.5: must be above 0, up to 1"),
        ({"full_rows": 1.5}, r"full_rows=1\.5: must be from 0 to 1"),
        ({"full_rows": 0.5, "weights": {"notes": 1.0}}, r"full_rows=0\.5: at context_length=80 .* 0\.000 to 0\.000"),
        ({"full_rows": 1.0, "weights": {"notes": 1.0, "books": 3.0}}, r"the documents allow 0\.000 to 0\.7\d\d"),
    ],
)
def test_bad_settings(store: TokenStore, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"schedule\.stages\[1\]\.mix.*{message}"):
        build_mix(store, 80, 0, MixConfig(**settings), key="schedule.stages[1].mix")  # type: ignore[arg-type]


def test_check_needs_no_store() -> None:
    check_mix(MixConfig(weights={"a": 1.0}), ["a", "b"], "data.mix")
    with pytest.raises(ValueError, match="choose from a, b"):
        check_mix(MixConfig(weights={"c": 1.0}), ["b", "a", "a"], "data.mix")


def test_resume_far_into_a_run_is_quick(store: TokenStore) -> None:
    mix = build_mix(store, 64, 0, MixConfig(weights={"books": 0.9, "code": 0.1}))
    rows = mix.draw(10_000_000, 4)
    assert mix.draw(9_999_999, 5)[1:] == rows
