"""Documents → token stores, once. The same sources and tokenizer give the same folder, and then nothing is done.

    <store_dir>/<data.name>-<hash>/
        train/      a TokenStore
        heldout/    another, where `data.heldout` or `data.heldout_fraction` asks for one
        inputs.json what both depend on
        lock        held by the process that prepares

Work goes through in order: records are read, long texts cut into pieces, pieces encoded in batches by the tokenizer
library's own threads while the next ones are read, documents appended to the store. After a kill at any point the next
call goes on after the last whole shard and ends with the same files.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from moba_train.config import DataConfig, SourceConfig
from moba_train.data.changes import describe_changes
from moba_train.data.documents import SourceFile, Tally, describe, find_files, read_documents, read_records
from moba_train.data.encode import encode
from moba_train.data.filters import Overlap, SeenTexts, digest
from moba_train.data.store import FORMAT, MANIFEST, StoreWriter, TokenStore, write_json
from moba_train.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["TokenStore", "prepare_store"]

SHARD_BYTES = 32 << 20  # a kill loses what was tokenised for the newest shard: half a minute on 2 cores
INPUTS = "inputs.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """One store to make: its sources with their files, and which of their documents belong to it."""

    name: str
    sources: list[tuple[SourceConfig, list[SourceFile]]]
    keeps: Callable[[float], bool]  # by a number from 0 to 1 that the text alone decides
    of_train: bool = False  # held out by data.heldout_fraction


class Origin(NamedTuple):
    """Where a record came from, and what became of it: "document", or the field of Tally that counts it."""

    source: int
    file: int
    row: int
    fate: str
    problem: str
    share_read: float
    digest: int  # of its text


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
            if changes := _changes_since_last(folder, data.name, about):
                log.warning("preparing %s anew, as its inputs changed: %s", folder, "; ".join(changes))
            write_json(folder / INPUTS, about)
            for split in splits:
                if not (folder / split.name / MANIFEST).is_file():
                    _build(folder, split, data, tokenizer, about, progress)
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
    splits = [Split("train", train, lambda draw: draw >= fraction)]
    if heldout:
        splits.insert(0, Split("heldout", heldout, lambda draw: True))
    elif fraction:
        splits.insert(0, Split("heldout", train, lambda draw: draw < fraction, of_train=True))
    about = {
        "format": FORMAT,
        "tokenizer": tokenizer.sha256,
        "eos_id": tokenizer.eos_id,
        "append_eos": data.append_eos,
        "min_document_tokens": data.min_document_tokens,
        "heldout_fraction": fraction,
        "drop_duplicates": data.drop_duplicates,
        "exclude_words": data.exclude_words if data.exclude else 0,
        "train": [describe(*source) for source in train],
        "heldout": [describe(*source) for source in heldout],
        "exclude": [describe(source, find_files(source)) for source in data.exclude],
    }
    return splits, about


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
    folder: Path, split: Split, data: DataConfig, tokenizer: Tokenizer, about: dict[str, Any], progress: bool
) -> None:
    path = folder / split.name
    writer = StoreWriter(path, tokenizer.vocab_size, SHARD_BYTES)
    tallies = [Tally() for _ in split.sources]
    place = (0, 0, 0)  # the next source, file and row to read
    if writer.state:
        tallies = [Tally(**tally) for tally in writer.state["tallies"]]
        place = tuple(writer.state["place"])
        log.info("going on with %s after %d whole shards", path, len(writer.shards))
    # What the store holds decides what is a duplicate, so that an interruption changes nothing.
    seen, held = SeenTexts(writer.digests()), _heldout_digests(folder, split)
    end = [np.array([tokenizer.eos_id], np.uint32)] if data.append_eos else []

    def close_shard(place: tuple[int, int, int]) -> None:
        writer.close_shard({"place": place, "tallies": [asdict(tally) for tally in tallies]})

    def enough(number: int) -> bool:
        """Whether a source has given its max_tokens, of which data.heldout_fraction are held out."""
        limit = split.sources[number][0].max_tokens
        share = data.heldout_fraction if split.of_train else 1.0
        return limit is not None and tallies[number].tokens >= limit * share

    with _progress(split, progress) as advance:
        for origin, parts in encode(_origins(split, place, _overlap(data), enough), tokenizer):
            if enough(origin.source):
                continue  # read ahead of the record that reached it
            tokens = sum(map(len, parts))
            fate = _fate(origin, tokens, seen, held, data)
            tallies[origin.source].count(fate, split.sources[origin.source][0], origin.problem)
            if fate == "document":
                seen.add(origin.digest)
                tallies[origin.source].tokens += tokens + len(end)
                if writer.add(parts + end, origin.source, origin.digest):
                    close_shard((origin.source, origin.file, origin.row + 1))
            advance(origin, tokens)
    _check(split, tallies, data.min_document_tokens)
    close_shard((len(split.sources), 0, 0))
    sources = [describe(*source) | asdict(tally) for source, tally in zip(split.sources, tallies, strict=True)]
    settings = {name: value for name, value in about.items() if name not in ("train", "heldout", "exclude", "format")}
    writer.finish({"split": split.name, **settings, "tokenizer_path": tokenizer.path, "sources": sources})


def _fate(origin: Origin, tokens: int, seen: SeenTexts, held: SeenTexts, data: DataConfig) -> str:
    """What becomes of a record, now that its tokens are counted and the documents before it are known."""
    if origin.fate != "document":
        return origin.fate
    if tokens < data.min_document_tokens:
        return "short"
    if data.drop_duplicates and origin.digest in held:
        return "in_heldout"
    if data.drop_duplicates and origin.digest in seen:
        return "duplicate"
    return "document"


def _heldout_digests(folder: Path, split: Split) -> SeenTexts:
    """Of the held-out documents, for the split that must not have them. They are made first."""
    made = split.name == "train" and (folder / "heldout" / MANIFEST).is_file()
    return SeenTexts(TokenStore.open(folder / "heldout").digests() if made else np.empty(0))


def _overlap(data: DataConfig) -> Overlap | None:
    texts = (document["text"] for source in data.exclude for document in read_documents(source))
    return Overlap(texts, data.exclude_words) if data.exclude else None


def _changes_since_last(folder: Path, name: str, about: dict[str, Any]) -> list[str]:
    """What differs from the inputs of the newest other store of the same name; nothing for the first."""
    others = [file for file in folder.parent.glob(f"{glob.escape(name)}-*/{INPUTS}") if file.parent != folder]
    if not others:
        return []
    newest = max(others, key=lambda file: file.stat().st_mtime_ns)
    return describe_changes(json.loads(newest.read_text("utf-8")), about)


def _check(split: Split, tallies: list[Tally], min_tokens: int) -> None:
    """ValueError for a source with too many bad records, or a split without any document."""
    for (source, _), tally in zip(split.sources, tallies, strict=True):
        tally.check(source)
    if not any(tally.documents for tally in tallies):
        names = ", ".join(repr(source.name) for source, _ in split.sources)
        records = sum(t.records for t in tallies)
        fix = f"name data.{split.name} sources that have some"
        if split.of_train:
            fix = "raise data.heldout_fraction, or name data.heldout sources"
        raise ValueError(
            f"the {split.name} split holds no document: sources {names} gave {records} records, "
            f"{sum(t.empty for t in tallies)} empty, {sum(t.short for t in tallies)} shorter than "
            f"data.min_document_tokens={min_tokens}; {fix}"
        )


def _origins(
    split: Split, place: tuple[int, ...], overlap: Overlap | None, enough: Callable[[int], bool]
) -> Iterator[tuple[Origin, str]]:
    """Every record from ``place`` on, with its text where it is a document of this split."""
    first, file, row = place
    for number in range(first, len(split.sources)):
        source, files = split.sources[number]
        here = (file, row) if number == first else (0, 0)
        for record in () if enough(number) else read_records(source, files, *here):
            if enough(number):
                break
            number_of_text = digest(record.text) if record.text else 0
            if record.text is None:
                fate = "bad"
            elif not record.text:
                fate = "empty"
            elif not split.keeps((number_of_text % 2**64) / 2**64):
                fate = "other_split"
            else:
                fate = "overlapping" if overlap and overlap.found_in(record.text) else "document"
            origin = Origin(number, record.file, record.row, fate, record.problem, record.share_read, number_of_text)
            yield origin, record.text if record.text and fate == "document" else ""
        _check_unchanged(source, files)


def _check_unchanged(source: SourceConfig, files: list[SourceFile]) -> None:
    """ValueError for a source written to while it was read: its store would be of two versions under one name."""
    if find_files(source) != files:
        raise ValueError(f"source {source.name!r} changed while it was read; prepare it again once it is still")


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
