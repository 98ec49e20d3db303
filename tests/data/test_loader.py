"""The loader: rows the same for any number of ranks, exact resume, segments that do not touch."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moba_train.config import MixConfig
from moba_train.data.loader import Batch, RowLoader, heldout_batches
from moba_train.data.store import StoreWriter, TokenStore
from moba_train.loss import IGNORE

EOS = 0
MIXES = [
    MixConfig(),
    MixConfig(full_rows=0.3),
    MixConfig(weights={"numbers": 1.0}, length_weights={50: 3.0, 200: 0.5}),
    MixConfig(min_length=100, full_rows=0.6),
]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Forty documents of 1 to 300 tokens in several shards. No token is there twice: each tells where it is from."""
    path = tmp_path_factory.mktemp("loader") / "store"
    writer = StoreWriter(path, vocab_size=1 << 20, shard_bytes=4000)
    lengths = np.random.default_rng(0).integers(1, 300, 40)
    first = 1
    for length in lengths:
        if writer.add([np.arange(first, first + length, dtype=np.uint32)], source=0):
            writer.close_shard({})
        first += int(length)
    writer.close_shard({})
    writer.finish({"eos_id": EOS, "sources": [{"name": "numbers"}]})
    return TokenStore.open(path)


def rows_of(loaders: list[RowLoader], micro_batch_rows: int) -> np.ndarray:
    """The rows of the next step over all ranks, in order."""
    return np.concatenate(
        [batch.input_ids.numpy() for loader in loaders for batch in loader.next_step(micro_batch_rows)]
    )


def segments_of(batch: Batch) -> list[slice]:
    bounds = batch.cu_seqlens.tolist()
    return [slice(a, b) for a, b in itertools.pairwise(bounds) if a < b]


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 400), st.integers(0, 2))
def test_an_epoch_holds_every_token_once(store: TokenStore, context_length: int, seed: int) -> None:
    loader = RowLoader(store, context_length, rows_per_step=1, seed=seed)
    for _ in range(2):
        seen = [loader.next_step(1)[0] for _ in range(len(loader.mix.rows))]
        tokens = np.concatenate([batch.input_ids.flatten().numpy() for batch in seen])
        assert (np.sort(tokens[tokens != EOS]) == np.arange(1, store.tokens + 1)).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 200), st.sampled_from([1, 2, 4]), st.sampled_from(MIXES))
def test_segments(store: TokenStore, context_length: int, rows: int, mix: MixConfig) -> None:
    """A segment is consecutive tokens of one document, or padding; positions restart; its first label is ignored."""
    starts = np.cumsum(store.lengths) - store.lengths + 1
    loader = RowLoader(store, context_length, rows, mix=mix)
    for _ in range(3):
        (batch,) = loader.next_step(rows)
        ids, labels, positions = (t.flatten() for t in (batch.input_ids, batch.labels, batch.position_ids))
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens[-1] == batch.tokens == ids.numel()
        assert len(batch.cu_seqlens) == rows * loader.mix.rows.max_segments + 1
        for row in range(rows):
            assert row * context_length in batch.cu_seqlens
        for span in segments_of(batch):
            segment, length = ids[span], span.stop - span.start
            assert (positions[span] == torch.arange(length)).all()
            assert labels[span.start] == IGNORE
            if segment[0] == EOS:
                assert (segment == EOS).all() and (labels[span] == IGNORE).all()
                assert span.stop % context_length == 0
            else:
                assert (segment == torch.arange(length) + segment[0]).all()
                document = np.searchsorted(starts, segment[0].item(), side="right")
                assert document == np.searchsorted(starts, segment[-1].item(), side="right")
                assert (labels[span][1:] == segment[1:]).all()


@pytest.mark.parametrize("micro_batch_rows", [1, 2])
@pytest.mark.parametrize("world_size", [2, 4])
def test_world_size_changes_nothing(store: TokenStore, world_size: int, micro_batch_rows: int) -> None:
    alone = RowLoader(store, 64, rows_per_step=8, seed=3)
    ranks = [RowLoader(store, 64, 8, rank, world_size, seed=3) for rank in range(world_size)]
    for _ in range(60):  # several epochs: steps straddle their edges
        assert (rows_of([alone], 4) == rows_of(ranks, micro_batch_rows)).all()
    assert alone.epoch > 2


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 80), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.sampled_from(MIXES))
def test_resume_at_any_step(store: TokenStore, steps: int, before: int, after: int, mix: MixConfig) -> None:
    """Also with another number of ranks."""
    first = [RowLoader(store, 64, 4, rank, before, seed=7, mix=mix) for rank in range(before)]
    for _ in range(steps):
        rows_of(first, 1)
    states = [loader.state_dict() for loader in first]
    assert all(state == {"rows": 4 * steps} for state in states)
    second = [RowLoader(store, 64, 4, rank, after, seed=7, mix=mix) for rank in range(after)]
    for loader in second:
        loader.load_state_dict(states[0])
    for _ in range(5):
        assert (rows_of(first, 1) == rows_of(second, 1)).all()


def test_each_step_is_made_once_and_ahead(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = RowLoader(store, 100, rows_per_step=2)
    made: list[tuple[int, int]] = []
    make = loader._make_step
    monkeypatch.setattr(loader, "_make_step", lambda *step: made.append(step) or make(*step))
    for _ in range(3):
        loader.next_step(1)
    loader._thread.shutdown()
    assert made == [(0, 1), (2, 1), (4, 1), (6, 1)]


def test_what_was_drawn_is_told_alike_after_a_resume(store: TokenStore) -> None:
    """Of any rank of any number of them; whole epochs give whole numbers."""
    loader = RowLoader(store, 64, 4, seed=7)
    assert loader.as_row() == {}
    told = []
    padding = 0.0
    for _ in range(len(loader.mix.rows)):
        (batch,) = loader.next_step(4)
        pads = sum(span.stop - span.start for span in segments_of(batch) if batch.input_ids.flatten()[span][0] == EOS)
        told.append(loader.as_row())
        assert told[-1]["data/padding"] == pytest.approx(pads / batch.tokens)
        padding += told[-1]["data/padding"]
    assert told[-1]["data/epoch"] == told[-1]["data/epoch/numbers"] == 4
    assert all(row["data/share/numbers"] == 1 for row in told)
    assert padding / len(told) == pytest.approx(loader.mix.padding_share)
    rank = RowLoader(store, 64, 4, 1, 2, seed=7)
    rank.load_state_dict({"rows": 4 * 20})
    rank.next_step(1)
    assert rank.as_row() == told[20]


def test_a_fault_of_the_thread_is_raised(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = RowLoader(store, 64, 4)
    loader.next_step(4)
    loader.next_step(4)

    def fails(*arguments: object) -> Batch:
        raise OSError("the disk is gone")

    monkeypatch.setattr("moba_train.data.loader.make_batch", fails)
    loader.load_state_dict({"rows": 0})
    with pytest.raises(OSError, match="the disk is gone"):
        loader.next_step(4)


def test_epochs_and_seeds_differ(store: TokenStore) -> None:
    def order(seed: int, epoch: int) -> np.ndarray:
        loader = RowLoader(store, 64, 1, seed=seed)
        loader.load_state_dict({"rows": epoch * len(loader.mix.rows)})
        return np.concatenate([rows_of([loader], 1) for _ in range(len(loader.mix.rows))])

    first = order(0, 0)
    assert (first == order(0, 0)).all()
    assert (first != order(0, 1)).any()
    assert (first != order(1, 0)).any()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_heldout_rows_are_whole_contexts(store: TokenStore, world_size: int) -> None:
    batches = [heldout_batches(store, 100, 7, rank, world_size) for rank in range(world_size)]
    assert len({len(of_rank) for of_rank in batches}) == 1
    interleaved = [batch for group in zip(*batches, strict=True) for batch in group]
    valid = [batch for batch in interleaved if (batch.labels != IGNORE).any()]
    assert len(valid) == 7
    assert len({int(batch.input_ids[0, 0]) for batch in valid}) == 7
    for batch in valid:
        assert batch.cu_seqlens.tolist() == [0, 100]
        assert (batch.input_ids[0].diff() == 1).all()
        assert (batch.labels[0, 1:] == batch.input_ids[0, 1:]).all()


def test_heldout_takes_what_there_is(store: TokenStore) -> None:
    assert 0 < len(heldout_batches(store, 200, 10_000)) == (store.lengths // 200).sum()


def test_bad_input(store: TokenStore) -> None:
    with pytest.raises(ValueError, match=r"6 rows a step cannot be shared by 4 ranks; .* multiple of 256 "):
        RowLoader(store, 64, 6, 0, 4)
    with pytest.raises(ValueError, match="4 rows of a rank do not make micro-batches of 3"):
        RowLoader(store, 64, 4).next_step(3)
    with pytest.raises(ValueError, match=r"no held-out document reaches the context length 512: the longest has 29\d"):
        heldout_batches(store, 512, 4)


def test_documents_about_as_long_as_a_row(tmp_path: Path) -> None:
    """One token, a row less one, a row, a row and one, a hundred rows: cut and packed, none lost."""
    row = 50
    writer = StoreWriter(tmp_path / "store", vocab_size=1 << 20, shard_bytes=1 << 30)
    lengths = [1, row - 1, row, row + 1, 100 * row]
    for first, length in zip(np.cumsum([1, *lengths[:-1]]), lengths, strict=True):
        writer.add([np.arange(first, first + length, dtype=np.uint32)], source=0)
    writer.close_shard({})
    writer.finish({"eos_id": EOS, "sources": [{"name": "numbers"}]})
    loader = RowLoader(TokenStore.open(tmp_path / "store"), row, rows_per_step=1)
    assert (len(loader.mix.rows), loader.mix.rows.full_rows) == (104, 102)  # 49 + 1, and 1, go with each other
    seen = np.concatenate([loader.next_step(1)[0].input_ids.flatten() for _ in range(104)])
    assert np.sort(seen[seen != EOS]).tolist() == list(range(1, sum(lengths) + 1))


@pytest.mark.parametrize("damage", [b"\xff\xff\xff\xff", (1 << 20).to_bytes(4, "little")], ids=["largest", "first"])
def test_token_ids_that_were_damaged_on_disk_are_refused(store: TokenStore, tmp_path: Path, damage: bytes) -> None:
    """The store is opened without its shards being read: a GPU would end at such an id without a word."""
    path = tmp_path / "damaged"
    shutil.copytree(store.path, path)
    for shard in path.glob("*.tokens"):
        shard.write_bytes(damage * (shard.stat().st_size // 4))
    with pytest.raises(
        ValueError, match=r"damaged holds the token id \d+, in a vocabulary of \d+: .* prepare it again"
    ):
        RowLoader(TokenStore.open(path), 64, rows_per_step=8).next_step(8)
