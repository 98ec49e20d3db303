"""Sources → documents. Local text, JSONL, Parquet and Arrow files, and hub datasets; bad records counted.

A source's files are read in the order of their names, and each record is known by (file, row), so that an
interrupted reader can go on where it stopped. A text file is one document; of the other formats, each record's
``text_field``. Text and JSONL may be compressed (.gz, .xz, .zst).
"""

from __future__ import annotations

import glob
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow
import pyarrow.parquet

from moba_train.config import SourceConfig, SourceFormat

COMPRESSED = (".gz", ".xz", ".zst")
# The files that a folder is searched for; a glob names others.
SUFFIXES = {
    SourceFormat.text: (".txt", ".md"),
    SourceFormat.jsonl: (".jsonl", ".ndjson", ".json"),
    SourceFormat.parquet: (".parquet",),
    SourceFormat.arrow: (".arrow",),
}
ROWS_AT_ONCE = 64  # of a Parquet file: long documents make big rows
MOST_DROPPED = 0.001  # of a source's records


# What becomes of a record that gives no document: the field of Tally that counts it, and how people read it.
DROPPED = {
    "bad": "bad",
    "empty": "empty",
    "short": "too short",
    "duplicate": "duplicate",
    "in_heldout": "also held out",
    "overlapping": "overlaps an evaluation",
    "other_split": "other split",
}


class Record(NamedTuple):
    """One record of a source: its text, or the problem it has."""

    file: int
    row: int
    text: str | None
    problem: str = ""
    share_read: float = 1.0  # of its file


@dataclass(frozen=True)
class SourceFile:
    path: Path
    name: str  # inside the source's folder
    bytes: int
    changed: int  # modification time, ns


@dataclass
class Tally:
    """What became of a source's records."""

    records: int = 0
    bad: int = 0  # unreadable, or without a text
    empty: int = 0
    short: int = 0  # fewer tokens than data.min_document_tokens
    duplicate: int = 0  # the text of an earlier document, of this source or another
    in_heldout: int = 0  # the text of a held-out document
    overlapping: int = 0  # shares a run of words with a text of data.exclude
    other_split: int = 0  # held out, or kept for training
    documents: int = 0
    tokens: int = 0
    first_bad: str = ""

    def count(self, fate: str, source: SourceConfig, problem: str = "") -> None:
        """Enter a record that became a "document", or was left out for one of the reasons in DROPPED."""
        self.records += 1
        if fate == "bad":
            self.add_bad(source, problem)
        elif fate == "document":
            self.documents += 1
        else:
            setattr(self, fate, getattr(self, fate) + 1)

    def add_bad(self, source: SourceConfig, problem: str) -> None:
        self.bad += 1
        self.first_bad = self.first_bad or problem
        if self.bad > 10:  # too few to judge by until the source's end
            self.check(source)

    def check(self, source: SourceConfig) -> None:
        if self.bad > MOST_DROPPED * self.records:
            raise ValueError(
                f"source {source.name!r}: {self.bad} of {self.records} records are bad, above {MOST_DROPPED:.1%}; "
                f"the first: {self.first_bad}"
            )


def find_files(source: SourceConfig) -> list[SourceFile]:
    """The files of a source in reading order; none for a hub dataset."""
    where = f"source {source.name!r}: path {source.path!r}"
    if not source.path:
        raise ValueError(f"source {source.name!r} has no path; set it to a file, a folder, a glob or a hub name")
    if source.format is SourceFormat.hub:
        return []
    path = Path(source.path).expanduser()
    if path.is_file():
        base, found = path.parent, [path]
    elif path.is_dir():
        suffixes = SUFFIXES[source.format]
        base, found = path, [file for file in path.rglob("*") if _plain_name(file).endswith(suffixes)]
        if not any(file.is_file() for file in found):
            raise ValueError(
                f"{where} has no {' or '.join(suffixes)} files; check data.*.format, or name them by a glob"
            )
    elif glob.has_magic(source.path):
        fixed = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
        base, found = Path(*fixed), [Path(name) for name in glob.glob(str(path), recursive=True)]
        if not any(file.is_file() for file in found):
            raise ValueError(f"{where} matches no file; from {Path.cwd()}")
    else:
        raise ValueError(f"{where} does not exist; looked for {path.absolute()}")
    files = [SourceFile(file, str(file.relative_to(base)), *_size_and_time(file)) for file in found if file.is_file()]
    return sorted(files, key=lambda file: file.name)


def describe(source: SourceConfig, files: list[SourceFile]) -> dict[str, Any]:
    """What a store made from the source depends on. A hub dataset is taken as unchanging: pin it with name@revision."""
    about: dict[str, Any] = {"name": source.name, "format": source.format.value}
    if source.format is SourceFormat.hub:
        about |= {"path": source.path, "subset": source.subset, "split": source.split}
    if source.format is SourceFormat.text:
        about["encoding"] = source.encoding
    else:
        about["text_field"] = source.text_field
    about["files"] = [[file.name, file.bytes, file.changed] for file in files]
    return about


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
    """Every record of the source, from row ``row`` of file ``file`` on."""
    if source.format is SourceFormat.hub:
        yield from _read_hub(source, row)
        return
    read = {
        SourceFormat.text: _read_text,
        SourceFormat.jsonl: _read_jsonl,
        SourceFormat.parquet: _read_parquet,
        SourceFormat.arrow: _read_arrow,
    }[source.format]
    for number in range(file, len(files)):
        path = files[number].path
        try:
            for record in read(source, path):
                if number > file or record.row >= row:
                    yield record._replace(file=number)
        except (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
            raise ValueError(
                f"source {source.name!r}: {path} cannot be read ({error}); replace it, or leave it out"
            ) from error


def _plain_name(path: Path) -> str:
    return path.stem if path.suffix in COMPRESSED else path.name


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _open(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.LZMAFile(raw))
    if path.suffix == ".zst":
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        return cast(BinaryIO, io.BufferedReader(stream, 1 << 20))
    return raw


def _read_text(source: SourceConfig, path: Path) -> Iterator[Record]:
    with path.open("rb") as raw:
        content = _open(path, raw).read()
    encoding = "utf-8-sig" if source.encoding.lower().replace("-", "") == "utf8" else source.encoding
    try:
        yield Record(0, 0, content.decode(encoding).replace("\r\n", "\n"))
    except LookupError:
        raise ValueError(f"source {source.name!r}: encoding {source.encoding!r} is unknown; try utf-8") from None
    except UnicodeDecodeError as error:
        fix = "set the source's encoding (latin-1?) or convert the file"
        yield Record(0, 0, None, f"{path} is not {source.encoding} at byte {error.start}; {fix}")


def _read_jsonl(source: SourceConfig, path: Path) -> Iterator[Record]:
    size = max(1, path.stat().st_size)
    with path.open("rb") as raw:
        for row, line in enumerate(_open(path, raw)):
            if row == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            share = raw.tell() / size
            where = f"{path} line {row + 1}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Record(0, row, None, f"{where} is not JSON ({error})", share)
                continue
            if isinstance(record, dict) and source.text_field in record:
                yield _text_record(row, record[source.text_field], where, share)
            elif row == 0 and isinstance(record, dict):
                raise _no_field(source, path, record)
            else:
                yield Record(0, row, None, f"{where} has no field {source.text_field!r}", share)


def _read_parquet(source: SourceConfig, path: Path) -> Iterator[Record]:
    with pyarrow.parquet.ParquetFile(path) as file:
        if source.text_field not in file.schema_arrow.names:
            raise _no_field(source, path, file.schema_arrow.names)
        batches = file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[source.text_field])
        yield from _read_columns((batch.column(0) for batch in batches), path, file.metadata.num_rows)


def _read_arrow(source: SourceConfig, path: Path) -> Iterator[Record]:
    with pyarrow.memory_map(str(path)) as stream:
        try:
            reader: Any = pyarrow.ipc.open_stream(stream)  # what `datasets` writes
            batches: Iterable[Any] = reader
        except pyarrow.ArrowInvalid:
            stream.seek(0)
            reader = pyarrow.ipc.open_file(stream)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        if source.text_field not in reader.schema.names:
            raise _no_field(source, path, reader.schema.names)
        yield from _read_columns((batch.column(source.text_field) for batch in batches), path, 0)


def _read_columns(columns: Iterable[Any], path: Path, rows: int) -> Iterator[Record]:
    for row, value in enumerate(itertools.chain.from_iterable(columns)):
        where = f"{path} row {row}"
        share = row / rows if rows else 0.0
        try:
            yield _text_record(row, value.as_py(), where, share)
        except UnicodeDecodeError as error:
            yield Record(0, row, None, f"{where} is not UTF-8 ({error})", share)


def _read_hub(source: SourceConfig, start: int) -> Iterator[Record]:
    import datasets  # most sources do without its second of import

    name, _, revision = source.path.partition("@")
    try:
        stream = datasets.load_dataset(
            name, source.subset, split=source.split, revision=revision or None, streaming=True
        )
    except Exception as error:  # datasets, huggingface_hub, fsspec and the network: each has its own
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"source {source.name!r}: hub dataset {name!r} (subset {source.subset}, split {source.split}) "
            f"cannot be opened: {first}"
        ) from error
    if stream.column_names is not None:
        if source.text_field not in stream.column_names:
            raise _no_field(source, name, stream.column_names)
        stream = stream.select_columns([source.text_field])
    for row, record in enumerate(stream.skip(start), start):
        if source.text_field not in record:
            raise _no_field(source, name, record)
        yield _text_record(row, record[source.text_field], f"{name} record {row}", 0.0)


def _text_record(row: int, text: Any, where: str, share: float) -> Record:
    if not isinstance(text, str):
        return Record(0, row, None, f"{where}: the text is {type(text).__name__}, not a string", share)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair
        return Record(0, row, None, f"{where} is not Unicode text ({error.reason})", share)
    return Record(0, row, text, share_read=share)


def _no_field(source: SourceConfig, where: Path | str, fields: Iterable[str]) -> ValueError:
    return ValueError(
        f"source {source.name!r}: {where} has no field {source.text_field!r} but {', '.join(map(repr, fields))}; "
        "set the source's text_field"
    )
