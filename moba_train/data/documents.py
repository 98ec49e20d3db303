"""Sources → documents: the files of a source, and its records in order.

A source's files are read in the order of their names, and each record is known by (file, row), so that an
interrupted reader can go on where it stopped. A text file is one document, and so is a code repository; of the other
formats, each record's ``text_field``, or all records of one ``group_field`` that follow each other.

What input that is not as it should be leads to:

    empty file or text             no document; counted as empty (an empty stream of JSONL: no record)
    bad UTF-8, half a surrogate,   the record is dropped and counted as bad; above 0.1 % of a source's records the
    no JSON, no text, no string    preparation stops with the first one's place and fault
    no such field at all           stops, naming the fields there are
    unreadable or truncated file   stops, naming the file
    byte order mark, CR LF         the mark is dropped, CR LF of text files and repositories becomes LF
    NUL                            kept: a character like others (a file of a repository with one counts as binary)
    a token id >= the vocabulary   stops, naming file and record
    too few documents              stops: no document in a split (split.py), or none for a mix (mix.py)
    token ids of another tokenizer stops (inputs.py)
    files that change              stops while they are read; later the store is refused, saying what changed, or made
                                   anew with data.rebuild=true (inputs.py)
"""

from __future__ import annotations

import glob
import itertools
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow

from moba_train.config import SourceConfig, SourceFormat
from moba_train.data import mds, repositories
from moba_train.data.formats import Record, join, read_arrow, read_hub, read_jsonl, read_parquet, read_text
from moba_train.data.tally import Tally

COMPRESSED = (".gz", ".xz", ".zst")
# The files that a folder is searched for; a glob names others.
SUFFIXES = {
    SourceFormat.text: (".txt", ".md"),
    SourceFormat.jsonl: (".jsonl", ".ndjson", ".json"),
    SourceFormat.parquet: (".parquet",),
    SourceFormat.arrow: (".arrow",),
}
UNREADABLE = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    pyarrow.ArrowException,
    tarfile.TarError,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class SourceFile:
    path: Path
    name: str  # inside the source's folder
    bytes: int
    changed: int  # modification time, ns


def find_files(source: SourceConfig) -> list[SourceFile]:
    """The files of a source in reading order; none for a hub dataset."""
    where = f"source {source.name!r}: path {source.path!r}"
    if not source.path:
        raise ValueError(f"source {source.name!r} has no path; set it to a file, a folder, a glob or a hub name")
    if source.format is SourceFormat.hub:
        return []
    path = Path(source.path).expanduser()
    if not path.exists() and not glob.has_magic(source.path):
        raise ValueError(f"{where} does not exist; looked for {path.absolute()}")
    if source.format is SourceFormat.repository:
        base, found = repositories.find(path)
        if not found:
            raise ValueError(
                f"{where} has no repository: neither a folder nor one of {', '.join(repositories.ARCHIVES)}"
            )
    elif source.format is SourceFormat.mds:
        base, found = path, mds.find(source, path)
    elif path.is_file():
        base, found = path.parent, [path]
    elif path.is_dir():
        suffixes = SUFFIXES[source.format]
        base, found = path, [file for file in path.rglob("*") if _plain_name(file).endswith(suffixes)]
        if not any(file.is_file() for file in found):
            raise ValueError(
                f"{where} has no {' or '.join(suffixes)} files; check data.*.format, or name them by a glob"
            )
    else:
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
        base, found = Path(*fixed), [Path(name) for name in glob.glob(str(path), recursive=True)]
        if not any(file.is_file() for file in found):
            raise ValueError(f"{where} matches no file; from {Path.cwd()}")
    wanted = found if source.format is SourceFormat.repository else [file for file in found if file.is_file()]
    files = [SourceFile(file, str(file.relative_to(base)), *_size_and_time(file)) for file in wanted]
    return sorted(files, key=lambda file: file.name)


def read_documents(source: SourceConfig) -> Iterator[dict[str, str]]:
    """``{"text", "name"}`` of every document. Bad records are dropped; above 0.1 % of them, ValueError."""
    files = find_files(source)
    tally = Tally()
    for record in read_records(source, files):
        tally.records += 1
        if record.text is None:
            tally.add_bad(source, record.problem)
        elif record.text:
            file = files[record.file].name if files else source.path
            yield {"text": record.text, "name": f"{file}#{record.row}"}
    tally.check(source)


def read_records(source: SourceConfig, files: list[SourceFile], file: int = 0, row: int = 0) -> Iterator[Record]:
    """Every record of the source, from row ``row`` of file ``file`` on. A record joined of several has its last row."""
    if source.format is SourceFormat.hub:
        yield from _joined(source, read_hub(source, row))
        return
    read = {
        SourceFormat.text: read_text,
        SourceFormat.jsonl: read_jsonl,
        SourceFormat.parquet: read_parquet,
        SourceFormat.arrow: read_arrow,
        SourceFormat.mds: mds.read,
        SourceFormat.repository: repositories.read,
    }[source.format]
    for number in range(file, len(files)):
        path = files[number].path
        first = row if number == file else 0
        try:
            records = (record for record in read(source, path) if record.row >= first)
            for record in _joined(source, records):
                yield record._replace(file=number)
        except UNREADABLE as error:
            why = " ".join(str(error).split())  # tarfile has a line for each compression it tried
            raise ValueError(
                f"source {source.name!r}: {path} cannot be read ({why}); replace it, or leave it out"
            ) from error


def _joined(source: SourceConfig, records: Iterator[Record]) -> Iterator[Record]:
    """Records of the same group that follow each other as one, each text under a header with its path."""
    if not source.group_field:
        yield from records
        return
    last: Record | None = None
    texts: list[tuple[str, str]] = []
    for record in records:
        if record.text is None:
            yield record
            if last is not None:  # told already: who goes on after the group is not to read it again
                last = last._replace(row=record.row)
            continue
        if last is not None and (record.group is None or record.group != last.group):
            yield last._replace(text=join(source, texts))
            texts = []
        texts.append((record.path, record.text))
        last = record
    if last is not None:
        yield last._replace(text=join(source, texts))


def _plain_name(path: Path) -> str:
    return path.stem if path.suffix in COMPRESSED else path.name


def _size_and_time(path: Path) -> tuple[int, int]:
    """Bytes, and the time of the last change in ns; of a folder, over all in it that is not hidden."""
    within = [file for file in path.rglob("[!.]*") if file.is_file()] if path.is_dir() else [path]
    within = [file for file in within if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    statuses = [file.stat() for file in within]
    return sum(status.st_size for status in statuses), max((status.st_mtime_ns for status in statuses), default=0)
