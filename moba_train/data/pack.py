"""Documents → rows of one context length, no token lost or repeated, with few pad tokens.

A document at least one row long gives as many full rows as it holds; what is left of it, and every shorter document,
is placed best-fit, longest first: into the fullest row that still has room. Rows with equal room are interchangeable,
so the work goes by (length, room) pairs and whole groups of rows: O(n log n) in the documents, and about a second for
10^6 of them.

Whole documents cannot fill every row: many of 0.6 rows leave 40 % of each. Where more padding than allowed is left, the
emptiest rows are given up and their documents cut to fill the others, no more of them than it takes. What then remains
is less than one row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Rows:
    """Which spans of which documents make each row: row ``r`` is spans ``offsets[r]`` to ``offsets[r + 1]``, in order,
    then padding. A span is tokens ``starts[s]`` to ``starts[s] + lengths[s]`` of document ``documents[s]``.
    """

    context_length: int
    offsets: np.ndarray  # (rows + 1,) int64
    documents: np.ndarray  # (spans,) int64
    starts: np.ndarray  # (spans,) int64
    lengths: np.ndarray  # (spans,) int64, none 0
    full_rows: int  # rows that are one full-length span; 0 where no document is as long as the context

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def used(self) -> np.ndarray:
        """(rows,) document tokens of each row."""
        return np.add.reduceat(self.lengths, self.offsets[:-1]) if len(self) else np.zeros(0, np.int64)

    @property
    def is_full(self) -> np.ndarray:
        """(rows,) bool: the row is one full-length span."""
        return (np.diff(self.offsets) == 1) & (self.used == self.context_length)

    @property
    def max_segments(self) -> int:
        """The most segments that a row has, its padding included."""
        return int((np.diff(self.offsets) + (self.used < self.context_length)).max(initial=0))

    def renamed(self, documents: np.ndarray) -> Rows:
        """The same rows of documents that are called ``documents[0]``, ``documents[1]``, … elsewhere."""
        return replace(self, documents=documents[self.documents])

    def slice(self, first: int, stop: int) -> Rows:
        """Rows ``first`` to ``stop``."""
        spans = slice(self.offsets[first], self.offsets[stop])
        return Rows(
            context_length=self.context_length,
            offsets=self.offsets[first : stop + 1] - self.offsets[first],
            documents=self.documents[spans],
            starts=self.starts[spans],
            lengths=self.lengths[spans],
            full_rows=int(self.is_full[first:stop].sum()),
        )


def pack(lengths: np.ndarray, context_length: int, seed: int = 0, most_padding: float = 1.0) -> Rows:
    """``lengths`` (documents,) tokens of each document. ``seed`` decides which of equally long pieces share a row.
    Above ``most_padding``, pad tokens over all, documents are cut.

    Full rows come first, in the documents' order; the loader orders the rows of an epoch anew.
    """
    if context_length < 1:
        raise ValueError(f"context_length is {context_length}; it must be at least 1 token")
    return _cut_to_fill(_pack_whole(np.asarray(lengths, np.int64), context_length, seed), most_padding)


def _pack_whole(lengths: np.ndarray, context_length: int, seed: int) -> Rows:
    # Full rows: document d gives counts[d] of them, at multiples of the context length.
    counts = lengths // context_length
    full_documents = np.repeat(np.arange(len(lengths)), counts)
    full_starts = _ranks(counts) * context_length

    # What is left, longest first; equals in an order drawn from the seed.
    left = lengths % context_length
    piece_documents = np.random.default_rng(seed).permutation(np.flatnonzero(left))
    piece_documents = piece_documents[np.argsort(-left[piece_documents], kind="stable")]
    piece_lengths = left[piece_documents]
    piece_rows = _best_fit(piece_lengths, context_length)
    by_row = np.argsort(piece_rows, kind="stable")
    packed_rows = int(piece_rows.max(initial=-1)) + 1

    spans_of_row = np.concatenate(
        [np.ones(len(full_documents), np.int64), np.bincount(piece_rows, minlength=packed_rows)]
    )
    piece_starts = counts[piece_documents] * context_length
    return Rows(
        context_length=context_length,
        offsets=np.concatenate([[0], np.cumsum(spans_of_row)]).astype(np.int64),
        documents=np.concatenate([full_documents, piece_documents[by_row]]),
        starts=np.concatenate([full_starts, piece_starts[by_row]]),
        lengths=np.concatenate([np.full(len(full_documents), context_length), piece_lengths[by_row]]),
        full_rows=len(full_documents),
    )


def _cut_to_fill(rows: Rows, most_padding: float) -> Rows:
    """The emptiest rows' spans, cut where the others' room ends, put there; so many that padding is within bounds."""
    length = rows.context_length
    room = length - rows.used
    spare = int(room.sum())
    excess = spare - most_padding * len(rows) * length
    # Each row given up takes its length off both pad tokens and tokens.
    given_up = min(int(np.ceil(excess / (length * (1 - most_padding)))), spare // length) if excess > 0 else 0
    if not given_up:
        return rows
    order = np.argsort(room, kind="stable")
    kept, empty = np.sort(order[:-given_up]), order[-given_up:]
    spans = np.concatenate([np.arange(rows.offsets[row], rows.offsets[row + 1]) for row in empty])
    into = kept[np.argsort(-room[kept], kind="stable")]  # the most room first: fewest cuts
    # Laid end to end, the spans' tokens are cut wherever a span or a row's room ends.
    span_ends, room_ends = np.cumsum(rows.lengths[spans]), np.cumsum(room[into])
    bounds = np.union1d(span_ends, room_ends[room_ends < span_ends[-1]])
    starts = np.concatenate([[0], bounds[:-1]])
    of_span = np.searchsorted(span_ends, starts, side="right")
    of_row = into[np.searchsorted(room_ends, starts, side="right")]
    within = starts - (span_ends - rows.lengths[spans])[of_span]

    kept_spans = np.flatnonzero(~np.isin(_span_rows(rows), empty))
    row_of = np.concatenate([_span_rows(rows)[kept_spans], of_row])
    by_row = np.argsort(row_of, kind="stable")
    cut = spans[of_span]
    return Rows(
        context_length=length,
        offsets=np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=len(rows))[kept])]).astype(np.int64),
        documents=np.concatenate([rows.documents[kept_spans], rows.documents[cut]])[by_row],
        starts=np.concatenate([rows.starts[kept_spans], rows.starts[cut] + within])[by_row],
        lengths=np.concatenate([rows.lengths[kept_spans], bounds - starts])[by_row],
        full_rows=rows.full_rows,
    )


def _span_rows(rows: Rows) -> np.ndarray:
    """(spans,) the row of each span."""
    return np.repeat(np.arange(len(rows)), np.diff(rows.offsets))


def join(parts: list[Rows]) -> Rows:
    """The rows of all ``parts``, one after another."""
    spans = np.cumsum([0, *(len(part.documents) for part in parts)])
    offsets = [part.offsets[:-1] + first for part, first in zip(parts, spans[:-1], strict=True)]
    return Rows(
        context_length=parts[0].context_length,
        offsets=np.concatenate([*offsets, spans[-1:]]).astype(np.int64),
        documents=np.concatenate([part.documents for part in parts]),
        starts=np.concatenate([part.starts for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        full_rows=sum(part.full_rows for part in parts),
    )


def _ranks(counts: np.ndarray) -> np.ndarray:
    """0, 1, … counts[0] - 1, 0, 1, … counts[1] - 1, …"""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


def _best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece, given longest first: the row with the least room that holds it, else a new row."""
    rows = np.empty(len(lengths), np.int64)
    rows_with_room: defaultdict[int, list[np.ndarray]] = defaultdict(list)
    rooms: list[int] = []  # the keys of rows_with_room, ascending
    new_row = 0
    bounds = np.flatnonzero(np.diff(lengths, prepend=-1, append=-1))
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        length = int(lengths[start])
        while start < stop:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                room = rooms[at]
                group = rows_with_room[room].pop()
                if not rows_with_room[room]:
                    del rows_with_room[room], rooms[at]
                # The tightest rows take as many pieces each as they hold: after one piece they are tighter still.
            else:
                room = capacity
                each = capacity // length
                group = np.arange(new_row, new_row - (-(stop - start) // each))
                new_row += len(group)
            each = room // length
            used = min(len(group), -(-(stop - start) // each))
            placed = min(stop - start, used * each)
            rows[start : start + placed] = np.repeat(group[:used], each)[:placed]
            start += placed
            in_last = placed - (used - 1) * each
            for some, filled in ((group[: used - 1], each), (group[used - 1 : used], in_last), (group[used:], 0)):
                left = room - filled * length
                if len(some) and left:
                    if left not in rows_with_room:
                        insort(rooms, left)
                    rows_with_room[left].append(some)
    return rows
