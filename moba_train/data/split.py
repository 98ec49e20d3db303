"""A split of the documents, train or heldout: its sources, and which of their records become documents of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moba_train.config import DataConfig, SourceConfig
from moba_train.data.documents import SourceFile, find_files, read_documents, read_records
from moba_train.data.filters import Overlap, SeenTexts, digest
from moba_train.data.tally import DROPPED, Tally
from moba_train.data.tokenizer import Tokenizer


class NoDocument(ValueError):
    """A split would hold nothing."""


class Origin(NamedTuple):
    """Where a record came from, and what became of it: "document", or the field of Tally that counts it."""

    source: int
    file: int
    row: int
    fate: str
    problem: str
    share_read: float
    digest: int  # of its content


@dataclass(frozen=True)
class Split:
    """One store to make: its sources with their files, and which of their documents belong to it."""

    name: str
    sources: list[tuple[SourceConfig, list[SourceFile]]]
    keeps: Callable[[float], bool]  # by a number from 0 to 1 that the content alone decides
    group: str  # of data's sources: "train" too where data.heldout_fraction of it is held out
    share: float = 1.0  # of its sources' max_tokens

    def enough(self, number: int, tokens: int) -> bool:
        """Whether source ``number``, which gave so many tokens, has given its max_tokens."""
        limit = self.sources[number][0].max_tokens
        return limit is not None and tokens >= limit * self.share

    def place(self, origin: Origin) -> str:
        """Where a record lies, for a message."""
        source, files = self.sources[origin.source]
        return f"source {source.name!r}: {files[origin.file].path if files else source.path} record {origin.row + 1}"


def origins(
    split: Split,
    place: tuple[int, ...],
    tokenizer: Tokenizer,
    data: DataConfig,
    enough: Callable[[int], bool],
) -> Iterator[tuple[Origin, str | np.ndarray]]:
    """Every record from ``place`` on, with its content where it is a document of this split; of a source until it has
    given ``enough``."""
    overlap = _overlap(data)
    first, file, row = place
    for number in range(first, len(split.sources)):
        source, files = split.sources[number]
        here = (file, row) if number == first else (0, 0)
        for record in () if enough(number) else read_records(source, files, *here):
            if enough(number):
                break
            content = record.content
            fate, its_digest = _fate_by_content(content, split, overlap, tokenizer)
            origin = Origin(number, record.file, record.row, fate, record.problem, record.share_read, its_digest)
            yield origin, content if content is not None and fate == "document" else ""
        _check_unchanged(source, files)


def _fate_by_content(
    content: str | np.ndarray | None, split: Split, overlap: Overlap | None, tokenizer: Tokenizer
) -> tuple[str, int]:
    """What becomes of a record, so far as its content decides that, and the content's digest, 0 where it has none."""
    if content is None:
        return "bad", 0
    if not len(content):
        return "empty", 0
    its_digest = digest(content)
    if not split.keeps((its_digest % 2**64) / 2**64):
        return "other_split", its_digest
    if overlap and overlap.found_in(content if isinstance(content, str) else tokenizer.decode(content)):
        return "overlapping", its_digest
    return "document", its_digest


def fate_of(origin: Origin, tokens: int, seen: SeenTexts, held: SeenTexts, data: DataConfig) -> str:
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


def check_documents(split: Split, tallies: list[Tally], min_tokens: int) -> None:
    """ValueError for a source with too many bad records, NoDocument for a split without any."""
    for (source, _), tally in zip(split.sources, tallies, strict=True):
        tally.check(source)
    if not any(tally.documents for tally in tallies):
        names = ", ".join(repr(source.name) for source, _ in split.sources)
        records = sum(tally.records for tally in tallies)
        fates = {reason: sum(getattr(tally, reason) for tally in tallies) for reason in DROPPED}
        told = ", ".join(f"{count} {DROPPED[reason]}" for reason, count in fates.items() if count)
        fix = {
            "short": f"lower data.min_document_tokens={min_tokens}",
            "in_heldout": "hold out other documents",
            "other_split": f"{'lower' if split.name == 'train' else 'raise'} data.heldout_fraction, or add documents",
        }.get(max(fates, key=lambda reason: fates[reason]), f"name data.{split.name} sources that have some")
        raise NoDocument(
            f"the {split.name} split holds no document: sources {names} gave {records} records"
            f"{f' ({told})' if told else ''}; {fix}"
        )


def _overlap(data: DataConfig) -> Overlap | None:
    texts = (document["text"] for source in data.exclude for document in read_documents(source))
    return Overlap(texts, data.exclude_words) if data.exclude else None


def _check_unchanged(source: SourceConfig, files: list[SourceFile]) -> None:
    """ValueError for a source written to while it was read: its store would be of two versions under one name."""
    if find_files(source) != files:
        raise ValueError(f"source {source.name!r} changed while it was read; prepare it again once it is still")
