"""Texts → token ids at the tokenizer library's own speed: long texts in pieces, in batches, while the next are read."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from moba_train.data.tokenizer import Tokenizer

# A batch's encodings take about 40 bytes a character while they exist; two batches are encoded at a time. The others
# that wait, as texts or as ids, take little; they keep the cores busy while a file is opened or a shard flushed.
BATCH_CHARACTERS = 1 << 20
WAITING = 8  # batches
BATCH_RECORDS = 10_000
PIECE_CHARACTERS = 1 << 15  # small, so that one long document keeps every core busy

T = TypeVar("T")  # what a text comes with


def encode(records: Iterator[tuple[T, str | np.ndarray]], tokenizer: Tokenizer) -> Iterator[tuple[T, list[np.ndarray]]]:
    """Each record with its text's token ids in parts, in order, while the next batches are being read and encoded.
    Records that are token ids already pass."""
    with ThreadPoolExecutor(2) as pool:
        waiting: deque[tuple[Future[list[np.ndarray]], _Batch[T]]] = deque()
        parts: list[np.ndarray] = []  # of a record that goes on in the next batch

        def take() -> Iterator[tuple[T, list[np.ndarray]]]:
            nonlocal parts
            future, batch = waiting.popleft()
            arrays = future.result()
            done = 0
            for end, origin in batch.ends:
                yield origin, parts + arrays[done:end]
                parts, done = [], end
            parts = parts + arrays[done:]

        for batch in _batches(records, tokenizer.cuts()):
            waiting.append((pool.submit(_encode, tokenizer, batch.pieces), batch))
            if len(waiting) > WAITING:
                yield from take()
        while waiting:
            yield from take()


@dataclass
class _Batch(Generic[T]):
    """Pieces to encode together, and how many of them precede the end of each record that ends among them."""

    pieces: list[str | np.ndarray] = field(default_factory=list)
    ends: list[tuple[int, T]] = field(default_factory=list)


def _encode(tokenizer: Tokenizer, pieces: list[str | np.ndarray]) -> list[np.ndarray]:
    encoded = iter(tokenizer.encode_batch([piece for piece in pieces if isinstance(piece, str)]))
    return [next(encoded) if isinstance(piece, str) else piece for piece in pieces]


def _batches(records: Iterator[tuple[T, str | np.ndarray]], cuts: re.Pattern[str] | None) -> Iterator[_Batch[T]]:
    batch = _Batch[T]()
    characters = 0
    for origin, content in records:
        for piece in _pieces(content, cuts) if cuts and isinstance(content, str) else [content]:
            if characters >= BATCH_CHARACTERS or len(batch.ends) >= BATCH_RECORDS:
                yield batch
                batch, characters = _Batch[T](), 0
            batch.pieces.append(piece)
            characters += len(piece)
        batch.ends.append((len(batch.pieces), origin))
    yield batch


def _pieces(text: str, cuts: re.Pattern[str]) -> Iterator[str]:
    """The text in pieces of about PIECE_CHARACTERS."""
    start = 0
    while cut := cuts.search(text, start + PIECE_CHARACTERS):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]
