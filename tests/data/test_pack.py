"""Packing: every token exactly once, rows no longer than the context, little padding."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moba_train.data.pack import Rows, pack


def check_cover(rows: Rows, lengths: np.ndarray) -> None:
    """Each document's spans, in order of their starts, join without gap or overlap."""
    order = np.lexsort((rows.starts, rows.documents))
    documents, starts, sizes = rows.documents[order], rows.starts[order], rows.lengths[order]
    expected_starts = np.where(np.diff(documents, prepend=-1) == 0, np.roll(starts + sizes, 1), 0)
    assert (starts == expected_starts).all()
    covered = np.zeros(len(lengths), np.int64)
    np.add.at(covered, documents, sizes)
    assert (covered == lengths).all()


def plain_best_fit(pieces: np.ndarray, capacity: int) -> int:
    """Rows that best-fit decreasing needs, one piece after another."""
    rooms: list[int] = []
    for piece in sorted((int(piece) for piece in pieces if piece), reverse=True):
        fitting = [room for room in rooms if room >= piece]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - piece)
    return len(rooms)


def padding_share(rows: Rows) -> float:
    """Pad tokens over all tokens of the rows."""
    return 1 - rows.used.sum() / max(1, len(rows) * rows.context_length)


lengths_lists = st.lists(st.integers(0, 70), max_size=60).map(lambda values: np.array(values, np.int64))
# Many documents of a few lengths: whole groups of rows have equal room, and a piece may take one of them.
lengths_repeated = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), max_size=6).map(
    lambda groups: np.repeat(*np.array(groups, np.int64).reshape(-1, 2).T)
)


@settings(max_examples=300, deadline=None)
@given(lengths_lists | lengths_repeated, st.integers(1, 33), st.integers(0, 3))
@example(np.repeat([6, 2, 1], [3, 3, 20]), 10, 0)  # the last piece of 2 takes one of two rows with room for two
def test_every_token_once(lengths: np.ndarray, context_length: int, seed: int) -> None:
    rows = pack(lengths, context_length, seed)
    check_cover(rows, lengths)
    assert (rows.lengths > 0).all()
    used = [rows.lengths[a:b].sum() for a, b in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)]
    assert all(0 < row <= context_length for row in used)
    assert rows.full_rows == (lengths // context_length).sum()
    assert len(rows) == rows.full_rows + plain_best_fit(lengths % context_length, context_length)


@settings(max_examples=300, deadline=None)
@given(lengths_lists, st.integers(1, 33), st.floats(0.001, 0.9))
def test_documents_are_cut_where_there_is_too_much_padding(
    lengths: np.ndarray, context_length: int, most_padding: float
) -> None:
    """Every token still once; padding within bounds, or less than a row; no document cut that need not be."""
    whole = pack(lengths, context_length)
    rows = pack(lengths, context_length, most_padding=most_padding)
    check_cover(rows, lengths)
    assert (rows.lengths > 0).all() and (rows.used <= context_length).all()
    padding = len(rows) * context_length - rows.lengths.sum()
    assert padding_share(rows) <= most_padding or padding < context_length
    assert rows.full_rows == whole.full_rows == rows.is_full.sum()
    if padding_share(whole) <= most_padding:
        assert (rows.offsets == whole.offsets).all() and (rows.documents == whole.documents).all()
    elif len(rows) < len(whole):
        one_more = (len(rows) + 1) * context_length - rows.lengths.sum()
        assert one_more > most_padding * (len(rows) + 1) * context_length  # a row less given up would be too few


def test_documents_of_more_than_half_a_row() -> None:
    """The worst case for whole documents, at a size where time counts."""
    lengths = np.random.default_rng(0).integers(1100, 1400, 300_000)
    assert padding_share(pack(lengths, 2048)) > 0.35
    start = time.perf_counter()
    rows = pack(lengths, 2048, most_padding=0.01)
    assert time.perf_counter() - start < 20  # about 1 s alone
    assert padding_share(rows) <= 0.01
    check_cover(rows, lengths)
    assert (np.bincount(rows.documents) > 1).mean() < 0.7


@pytest.mark.parametrize(
    ("lengths", "rows", "full_rows"),
    [
        ([7], 1, 0),
        ([8], 1, 1),
        ([9], 2, 1),
        ([800], 100, 100),
        ([1], 1, 0),
        ([5, 3, 4, 4], 2, 0),
        ([6, 5, 3, 2], 2, 0),
        ([1] * 8, 1, 0),
        ([], 0, 0),
        ([0, 0], 0, 0),
        ([5, 5, 5], 3, 0),
    ],
    ids=str,
)
def test_known_rows(lengths: list[int], rows: int, full_rows: int) -> None:
    packed = pack(np.array(lengths, np.int64), 8)
    assert (len(packed), packed.full_rows) == (rows, full_rows)


def test_unreached_context_still_packs() -> None:
    packed = pack(np.array([10, 20, 30]), 1000)
    assert (len(packed), packed.full_rows) == (1, 0)
    assert padding_share(packed) == pytest.approx(0.94)
    assert packed.max_segments == 4  # three documents and the padding


def test_seed_changes_company_only() -> None:
    lengths = np.full(64, 3)
    one, same, other = pack(lengths, 8, 1), pack(lengths, 8, 1), pack(lengths, 8, 2)
    assert (one.documents == same.documents).all()
    assert (one.documents != other.documents).any()
    assert len(one) == len(other)


def test_padding_and_speed_at_a_million_documents() -> None:
    lengths = np.random.default_rng(0).lognormal(8, 1.5, 1_000_000).astype(np.int64) + 1
    start = time.perf_counter()
    rows = pack(lengths, 32768)
    assert time.perf_counter() - start < 20  # about 1 s alone
    assert padding_share(rows) < 0.001
    check_cover(rows, lengths)


def test_bad_context_length() -> None:
    with pytest.raises(ValueError, match="context_length is 0"):
        pack(np.array([5]), 0)
