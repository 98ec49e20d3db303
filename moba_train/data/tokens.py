"""Documents → token stores, once. The same sources and tokenizer give the same folder, and then nothing is done.

    <store_dir>/<data.name>-<hash>/
        train/      a TokenStore
        heldout/    another, where `data.heldout` or `data.heldout_fraction` asks for one
        lock        held by the process that prepares

Work goes through in order: records are read, long texts cut into pieces, pieces encoded in batches by the tokenizer
library's own threads while the next ones are read, documents appended to the store. After a kill at any point the next
call goes on after the last whole shard and ends with the same files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from moba_train.config import DataConfig, SourceConfig
from moba_train.data.documents import SourceFile, Tally, describe, find_files, read_records
from moba_train.data.store import FORMAT, MANIFEST, StoreWriter, TokenStore
from moba_train.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["TokenStore", "prepare_store"]

SHARD_BYTES = 256 << 20
# A batch's encodings take about 40 bytes a character while they exist; three batches exist at a time.
BATCH_CHARACTERS = 1 << 20
BATCH_RECORDS = 10_000
PIECE_CHARACTERS = 1 << 15  # small, so that one long document keeps every core busy
CUT = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """One store to make: its sources with their files, and which of their documents belong to it."""

    name: str
    sources: list[tuple[SourceConfig, list[SourceFile]]]
    keeps: Callable[[str], bool]


class Origin(NamedTuple):
    """Where a record came from, and what became of it: document, bad, empty or other_split."""

    source: int
    file: int
    row: int
    fate: str
    problem: str
    share_read: float


def prepare_store(data: DataConfig, tokenizer_path: str, progress: bool = True) -> Path:
    """The folder with ``data``'s token stores, which are made first where they are missing or unfinished.

    Raises ValueError for a source that is missing, empty, without its text field or too often bad.
    """
    if data.threads:
        os.environ["RAYON_NUM_THREADS"] = str(data.threads)  # read once, when tokenizers first encodes a batch
    tokenizer = load_tokenizer(tokenizer_path)
    splits, about = plan(data, tokenizer)
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    folder = Path(data.store_dir) / f"{data.name}-{digest[:16]}"
    if _finished(folder, splits):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            for split in splits:
                if not (folder / split.name / MANIFEST).is_file():
                    _build(folder / split.name, split, data, tokenizer, about, progress)
    except OSError as error:  # of writing: what goes wrong in reading is a ValueError already
        raise ValueError(f"data.store_dir {data.store_dir!r} cannot be written: {error.strerror}") from error
    return folder


def plan(data: DataConfig, tokenizer: Tokenizer) -> tuple[list[Split], dict[str, Any]]:
    """The splits to make, held-out first so that an empty one is found out early, and all that they depend on."""
    if not data.train:
        raise ValueError("data.train names no source; give it one, or choose a data config that has some")
    if not 0 <= data.heldout_fraction < 1:
        raise ValueError(f"data.heldout_fraction is {data.heldout_fraction}; it must be from 0 to below 1")
    train = [(source, find_files(source)) for source in data.train]
    heldout = [(source, find_files(source)) for source in data.heldout]
    fraction = 0.0 if heldout else data.heldout_fraction
    splits = [Split("train", train, lambda text: not fraction or _draw(text) >= fraction)]
    if heldout:
        splits.insert(0, Split("heldout", heldout, lambda text: True))
    elif fraction:
        splits.insert(0, Split("heldout", train, lambda text: _draw(text) < fraction))
    about = {
        "format": FORMAT,
        "tokenizer": tokenizer.sha256,
        "eos_id": tokenizer.eos_id,
        "append_eos": data.append_eos,
        "min_document_tokens": data.min_document_tokens,
        "heldout_fraction": fraction,
        "train": [describe(*source) for source in train],
        "heldout": [describe(*source) for source in heldout],
    }
    return splits, about


def _draw(text: str) -> float:
    """A number from 0 to 1 that only the text decides, so that equal documents fall into one split."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def _finished(folder: Path, splits: list[Split]) -> bool:
    return all((folder / split.name / MANIFEST).is_file() for split in splits)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however it ends."""
    with (folder / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process prepares %s; waiting for it", folder)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _build(
    path: Path, split: Split, data: DataConfig, tokenizer: Tokenizer, about: dict[str, Any], progress: bool
) -> None:
    writer = StoreWriter(path, tokenizer.vocab_size, SHARD_BYTES)
    tallies = [Tally() for _ in split.sources]
    place = (0, 0, 0)  # the next source, file and row to read
    if writer.state:
        tallies = [Tally(**tally) for tally in writer.state["tallies"]]
        place = tuple(writer.state["place"])
        log.info("going on with %s after %d whole shards", path, len(writer.shards))

    def close_shard(place: tuple[int, int, int]) -> None:
        writer.close_shard({"place": place, "tallies": [asdict(tally) for tally in tallies]})

    end = [np.array([tokenizer.eos_id], np.uint32)] if data.append_eos else []
    with _progress(split, progress) as advance:
        for origin, parts in _encode(_origins(split, place), tokenizer):
            tokens = sum(map(len, parts))
            source, _ = split.sources[origin.source]
            if _counts(tallies[origin.source], source, origin, tokens, data.min_document_tokens):
                tallies[origin.source].tokens += tokens + len(end)
                if writer.add(parts + end, origin.source):
                    close_shard((origin.source, origin.file, origin.row + 1))
            advance(origin, tokens)
    _check(split, tallies, data.min_document_tokens)
    close_shard((len(split.sources), 0, 0))
    sources = [describe(*source) | asdict(tally) for source, tally in zip(split.sources, tallies, strict=True)]
    settings = {name: value for name, value in about.items() if name not in ("train", "heldout", "format")}
    writer.finish({"split": split.name, **settings, "tokenizer_path": tokenizer.path, "sources": sources})


def _counts(tally: Tally, source: SourceConfig, origin: Origin, tokens: int, min_tokens: int) -> bool:
    """Enter a record in its source's tally. True where it is a document for the store."""
    tally.records += 1
    if origin.fate == "bad":
        tally.add_bad(source, origin.problem)
    elif origin.fate == "empty":
        tally.empty += 1
    elif origin.fate == "other_split":
        tally.other_split += 1
    elif tokens < min_tokens:
        tally.short += 1
    else:
        tally.documents += 1
        return True
    return False


def _check(split: Split, tallies: list[Tally], min_tokens: int) -> None:
    """ValueError for a source with too many bad records, or a split without any document."""
    for (source, _), tally in zip(split.sources, tallies, strict=True):
        tally.check(source)
    if not any(tally.documents for tally in tallies):
        names = ", ".join(repr(source.name) for source, _ in split.sources)
        records = sum(t.records for t in tallies)
        raise ValueError(
            f"the {split.name} split holds no document: sources {names} gave {records} records, "
            f"{sum(t.empty for t in tallies)} empty, {sum(t.short for t in tallies)} shorter than "
            f"data.min_document_tokens={min_tokens}; name data.{split.name} sources that have some"
        )


def _origins(split: Split, place: tuple[int, ...]) -> Iterator[tuple[Origin, str]]:
    """Every record from ``place`` on, with its text where it is a document of this split."""
    first, file, row = place
    for number in range(first, len(split.sources)):
        source, files = split.sources[number]
        here = (file, row) if number == first else (0, 0)
        for record in read_records(source, files, *here):
            if record.text is None:
                fate = "bad"
            elif not record.text:
                fate = "empty"
            else:
                fate = "document" if split.keeps(record.text) else "other_split"
            origin = Origin(number, record.file, record.row, fate, record.problem, record.share_read)
            yield origin, record.text if record.text and fate == "document" else ""


def _encode(records: Iterator[tuple[Origin, str]], tokenizer: Tokenizer) -> Iterator[tuple[Origin, list[np.ndarray]]]:
    """Each record with its token ids in parts, in order, while the next batches are being read and encoded."""
    with ThreadPoolExecutor(2) as pool:
        waiting: deque[tuple[Future[list[np.ndarray]], TextBatch]] = deque()
        parts: list[np.ndarray] = []  # of a record that goes on in the next batch

        def take() -> Iterator[tuple[Origin, list[np.ndarray]]]:
            nonlocal parts
            future, batch = waiting.popleft()
            arrays = future.result()
            done = 0
            for end, origin in batch.ends:
                yield origin, parts + arrays[done:end]
                parts, done = [], end
            parts = parts + arrays[done:]

        for batch in _batches(records, tokenizer.cuts_between_words()):
            waiting.append((pool.submit(tokenizer.encode_batch, batch.texts), batch))
            if len(waiting) > 2:
                yield from take()
        while waiting:
            yield from take()


@dataclass
class TextBatch:
    """Texts to encode together, and how many of them precede the end of each record that ends among them."""

    texts: list[str] = field(default_factory=list)
    ends: list[tuple[int, Origin]] = field(default_factory=list)


def _batches(records: Iterator[tuple[Origin, str]], cuts: bool) -> Iterator[TextBatch]:
    batch = TextBatch()
    characters = 0
    for origin, text in records:
        for piece in _pieces(text) if cuts else [text]:
            if characters >= BATCH_CHARACTERS or len(batch.ends) >= BATCH_RECORDS:
                yield batch
                batch, characters = TextBatch(), 0
            batch.texts.append(piece)
            characters += len(piece)
        batch.ends.append((len(batch.texts), origin))
    yield batch


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of about PIECE_CHARACTERS, cut where `Tokenizer.cuts_between_words` allows it."""
    start = 0
    while cut := CUT.search(text, start + PIECE_CHARACTERS):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


@contextmanager
def _progress(split: Split, shown: bool) -> Iterator[Callable[[Origin, int], None]]:
    """A bar over the bytes of the split's files, and the tokens so far."""
    sizes = [[file.bytes for file in files] for _, files in split.sources]
    before = np.cumsum([0, *(sum(files) for files in sizes)])
    within = [np.cumsum([0, *files]) for files in sizes]
    bar = Progress(
        TextColumn("tokenising {task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(),
        disable=not shown,
    )
    task: TaskID = bar.add_task(split.name, total=float(before[-1]) or None, tokens=0)
    total = 0

    def advance(origin: Origin, tokens: int) -> None:
        nonlocal total
        total += tokens
        files = sizes[origin.source]
        share = files[origin.file] * origin.share_read if files else 0.0
        done = before[origin.source] + within[origin.source][origin.file if files else 0] + share
        bar.update(task, completed=float(done), tokens=total)

    with bar:
        yield advance
