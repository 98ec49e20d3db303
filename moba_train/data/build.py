"""Records → one token store, in order and from wherever an interrupted preparation stopped.

Records are read, long texts cut into pieces, pieces encoded in batches by the tokenizer library's own threads while the
next ones are read, documents appended to the store. After a kill at any point the next call goes on after the last
whole shard and ends with the same files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from moba_train.config import DataConfig, SourceConfig
from moba_train.data import inputs
from moba_train.data.documents import SourceFile, Tally, find_files, read_documents, read_records
from moba_train.data.encode import encode
from moba_train.data.filters import Overlap, SeenTexts, digest
from moba_train.data.store import MANIFEST, StoreWriter, TokenStore
from moba_train.data.tokenizer import Tokenizer

SHARD_BYTES = 32 << 20  # a kill loses what was tokenised for the newest shard: half a minute on 2 cores

log = logging.getLogger(__name__)


class NoDocument(ValueError):
    """A split would hold nothing."""


@dataclass(frozen=True)
class Split:
    """One store to make: its sources with their files, and which of their documents belong to it."""

    name: str
    sources: list[tuple[SourceConfig, list[SourceFile]]]
    keeps: Callable[[float], bool]  # by a number from 0 to 1 that the content alone decides
    of_train: bool = False  # held out by data.heldout_fraction


class Origin(NamedTuple):
    """Where a record came from, and what became of it: "document", or the field of Tally that counts it."""

    source: int
    file: int
    row: int
    fate: str
    problem: str
    share_read: float
    digest: int  # of its content


def build(
    folder: Path, split: Split, data: DataConfig, tokenizer: Tokenizer, files: inputs.Files, progress: bool
) -> None:
    """Make the store of a split in ``folder``, or what is missing of it.

    Raises:
        NoDocument: no record gave one.
        ValueError: a source that cannot be read, is too often bad, or changed meanwhile.
    """
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
        for origin, parts in encode(_origins(split, place, tokenizer, _overlap(data), enough), tokenizer):
            if enough(origin.source):
                continue  # read ahead of the record that reached it
            tokens = sum(map(len, parts))
            ends = [] if split.sources[origin.source][0].token_field else end
            fate = _fate(origin, tokens, seen, held, data)
            tallies[origin.source].count(fate, split.sources[origin.source][0], origin.problem)
            if fate == "document":
                seen.add(origin.digest)
                tallies[origin.source].tokens += tokens + len(ends)
                if writer.add(parts + ends, origin.source, origin.digest):
                    close_shard((origin.source, origin.file, origin.row + 1))
            advance(origin, tokens)
    _check(split, tallies, data.min_document_tokens)
    close_shard((len(split.sources), 0, 0))
    group = "train" if split.of_train else split.name
    sources = [
        inputs.describe(source) | inputs.summary(of_source) | asdict(tally)
        for (source, _), of_source, tally in zip(split.sources, files[group], tallies, strict=True)
    ]
    settings = {name: value for name, value in inputs.settings(data, tokenizer).items() if name not in inputs.GROUPS}
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


def _check(split: Split, tallies: list[Tally], min_tokens: int) -> None:
    """ValueError for a source with too many bad records, NoDocument for a split without any."""
    for (source, _), tally in zip(split.sources, tallies, strict=True):
        tally.check(source)
    if not any(tally.documents for tally in tallies):
        names = ", ".join(repr(source.name) for source, _ in split.sources)
        records = sum(t.records for t in tallies)
        fix = f"name data.{split.name} sources that have some"
        if split.of_train:
            fix = "raise data.heldout_fraction, or name data.heldout sources"
        raise NoDocument(
            f"the {split.name} split holds no document: sources {names} gave {records} records, "
            f"{sum(t.empty for t in tallies)} empty, {sum(t.short for t in tallies)} shorter than "
            f"data.min_document_tokens={min_tokens}; {fix}"
        )


def _origins(
    split: Split,
    place: tuple[int, ...],
    tokenizer: Tokenizer,
    overlap: Overlap | None,
    enough: Callable[[int], bool],
) -> Iterator[tuple[Origin, str | np.ndarray]]:
    """Every record from ``place`` on, with its content where it is a document of this split."""
    first, file, row = place
    for number in range(first, len(split.sources)):
        source, files = split.sources[number]
        here = (file, row) if number == first else (0, 0)
        for record in () if enough(number) else read_records(source, files, *here):
            if enough(number):
                break
            content = record.content
            number_of_content = 0
            if content is None:
                fate = "bad"
            elif not len(content):
                fate = "empty"
            else:
                number_of_content = digest(content)
                fate = "document" if split.keeps((number_of_content % 2**64) / 2**64) else "other_split"
            if overlap and content is not None and fate == "document":
                text = content if isinstance(content, str) else tokenizer.decode(content)
                fate = "overlapping" if overlap.found_in(text) else fate
            origin = Origin(number, record.file, record.row, fate, record.problem, record.share_read, number_of_content)
            yield origin, content if content is not None and fate == "document" else ""
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
