"""How each format's records are read: text, JSONL, Parquet, Arrow, hub datasets. Text and JSONL may be compressed."""

from __future__ import annotations

import gzip
import io
import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import pyarrow
import pyarrow.parquet

from moba_train import hub
from moba_train.config import FileOrder, SourceConfig
from moba_train.data.imports import imports_first

ROWS_AT_ONCE = 64  # of a Parquet file: long documents make big rows


class Record(NamedTuple):
    """One record of a source: its text or its token ids, or the problem it has."""

    file: int
    row: int
    text: str | None
    problem: str = ""
    share_read: float = 1.0  # of its file
    group: str | None = None  # of the source's group_field, where it has one
    path: str = ""  # of its path_field
    tokens: np.ndarray | None = None  # (tokens,) of a source with token_field, in place of a text

    @property
    def content(self) -> str | np.ndarray | None:
        return self.text if self.tokens is None else self.tokens


def open_compressed(path: Path, raw: BinaryIO) -> BinaryIO:
    """The content of ``raw``, unpacked as the ending of ``path`` (.gz, .xz, .zst) says; any other as it is."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.LZMAFile(raw))
    if path.suffix == ".zst":
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        return cast(BinaryIO, io.BufferedReader(stream, 1 << 20))
    return raw


def read_text(source: SourceConfig, path: Path) -> Iterator[Record]:
    """The whole file as one record, without a byte order mark and with LF line ends; bytes that are not of the source's
    encoding make it a bad one.

    Raises:
        ValueError: an encoding that Python does not know.
    """
    with path.open("rb") as raw:
        content = open_compressed(path, raw).read()
    encoding = "utf-8-sig" if source.encoding.lower().replace("-", "") == "utf8" else source.encoding
    try:
        yield Record(0, 0, content.decode(encoding).replace("\r\n", "\n"))
    except LookupError:
        raise ValueError(f"source {source.name!r}: encoding {source.encoding!r} is unknown; try utf-8") from None
    except UnicodeDecodeError as error:
        fix = "set the source's encoding (latin-1?) or convert the file"
        yield Record(0, 0, None, f"{path} is not {source.encoding} at byte {error.start}; {fix}")


def read_jsonl(source: SourceConfig, path: Path) -> Iterator[Record]:
    """A record a line that is not empty, bad where it is no JSON object or lacks a field.

    Raises:
        ValueError: the first line lacks a field: so will the others.
    """
    size = max(1, path.stat().st_size)
    with path.open("rb") as raw:
        for row, line in enumerate(open_compressed(path, raw)):
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
            if not isinstance(record, dict):  # all of a .json file as one list, most often
                kind = type(record).__name__
                yield Record(0, row, None, f"{where} is a JSON {kind}; JSONL has an object a line", share)
                continue
            missing = [field for field in fields_of(source) if field not in record]
            if not missing:
                yield _record(source, row, [record[field] for field in fields_of(source)], where, share)
            elif row == 0:
                raise _no_field(missing[0], source, path, record)
            else:
                yield Record(0, row, None, f"{where} has no field {missing[0]!r}", share)


def read_parquet(source: SourceConfig, path: Path) -> Iterator[Record]:
    """A record a row; of the columns only those that are wanted are read.

    Raises:
        ValueError: the file lacks one of them.
    """
    with pyarrow.parquet.ParquetFile(path) as file:
        check_fields(source, path, file.schema_arrow.names)
        batches = file.iter_batches(batch_size=ROWS_AT_ONCE, columns=fields_of(source))
        yield from _read_batches(source, batches, path, file.metadata.num_rows)


def read_arrow(source: SourceConfig, path: Path) -> Iterator[Record]:
    """As ``read_parquet``, of Arrow's stream or file format."""
    with pyarrow.memory_map(str(path)) as stream:
        try:
            reader: Any = pyarrow.ipc.open_stream(stream)  # what `datasets` writes
            batches: Iterable[Any] = reader
        except pyarrow.ArrowInvalid:
            stream.seek(0)
            reader = pyarrow.ipc.open_file(stream)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        check_fields(source, path, reader.schema.names)
        yield from _read_batches(source, batches, path, 0)


def _read_batches(source: SourceConfig, batches: Iterable[Any], path: Path, rows: int) -> Iterator[Record]:
    """``rows`` of the file; 0 where that is not known."""
    fields = fields_of(source)
    records = (values for batch in batches for values in zip(*(batch.column(field) for field in fields), strict=True))
    for row, values in enumerate(records):
        where = f"{path} row {row}"
        share = row / rows if rows else 0.0
        try:
            yield _record(source, row, [value.as_py() for value in values], where, share)
        except UnicodeDecodeError as error:
            yield Record(0, row, None, f"{where} is not UTF-8 ({error})", share)


def read_hub(source: SourceConfig, start: int) -> Iterator[Record]:
    """The records of a dataset on the hub, from number ``start`` on; or of files there, named hf://datasets/…"""
    import datasets  # most sources do without its second of import

    name, arguments = hub_arguments(source)
    try:
        if hub.out_of_reach(name):
            raise OSError(f"{hub.ENDPOINT} cannot be reached")
        stream = datasets.load_dataset(**arguments, streaming=True)
    except Exception as error:  # datasets, huggingface_hub, fsspec and the network: each has its own
        first = str(error).strip().partition("\n")[0]
        if "zstd" in first:
            first += "; pip install zstandard"
        raise ValueError(
            f"source {source.name!r}: hub dataset {name!r} (subset {source.subset}, split {source.split}) "
            f"cannot be opened: {first}"
        ) from error
    if stream.column_names is not None:
        check_fields(source, name, stream.column_names)
        stream = stream.select_columns(fields_of(source))
    for row, record in enumerate(stream.skip(start), start):
        check_fields(source, name, record)
        yield _record(source, row, [record[field] for field in fields_of(source)], f"{name} record {row}", 0.0)


def hub_arguments(source: SourceConfig) -> tuple[str, dict[str, Any]]:
    """The dataset's name, and how ``datasets.load_dataset`` is to be called for it."""
    if source.path.startswith("hf://"):  # data sets whose repository holds a script, or more than is wanted
        builder = "parquet" if source.path.endswith(".parquet") else "json"
        return source.path, {"path": builder, "data_files": {source.split: source.path}, "split": source.split}
    name, _, revision = source.path.partition("@")
    return name, {"path": name, "name": source.subset, "split": source.split, "revision": revision or None}


def fields_of(source: SourceConfig) -> list[str]:
    """The fields to read, that of the text or the token ids first."""
    if source.files_field:
        return [source.files_field]
    grouped = [source.group_field, source.path_field] if source.group_field else []
    return [field for field in (source.token_field or source.text_field, *grouped) if field]


def _record(source: SourceConfig, row: int, values: list[Any], where: str, share: float) -> Record:
    """``values`` of `fields_of`, in its order."""
    content, group, path = [*values, None, None][:3]
    if source.files_field:
        try:
            files = [(str(file[source.path_field]), file[source.text_field]) for file in content]
            content = join(source, sorted(file for file in files if file[1] is not None))
        except (TypeError, KeyError) as error:
            fix = f"of files with {source.path_field!r} and {source.text_field!r}"
            return Record(0, row, None, f"{where}: {source.files_field!r} is no list {fix} ({error})", share)
    if source.token_field:
        try:
            return Record(0, row, "", "", share, tokens=token_ids(content))
        except ValueError as error:
            return Record(0, row, None, f"{where}: {source.token_field!r} holds {error}", share)
    if not isinstance(content, str):
        return Record(0, row, None, f"{where}: the text is {type(content).__name__}, not a string", share)
    path = str(path or "")
    try:
        content.encode()
        path.encode()
    except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair
        return Record(0, row, None, f"{where} is not Unicode text ({error.reason})", share)
    return Record(0, row, content, "", share, None if group is None else str(group), path)


def join(source: SourceConfig, named_texts: list[tuple[str, str]]) -> str:
    """The files of a repository, (path, text), as one text: in their order or in import order, each under the source's
    header and with the line end that the next header needs."""
    if source.file_order is FileOrder.imports:
        named_texts = imports_first(named_texts)
    return "".join(
        source.file_header.replace("{path}", path) + text + ("" if text.endswith("\n") else "\n")
        for path, text in named_texts
    )


def token_ids(values: Any) -> np.ndarray:
    """(tokens,) uint32.

    Raises:
        ValueError: they are something else.
    """
    ids = np.asarray(values)
    if ids.ndim != 1 or (ids.size and (ids.dtype.kind not in "iu" or not 0 <= ids.min() <= ids.max() < 2**32)):
        raise ValueError("no row of token ids")
    return ids.astype(np.uint32)


def check_fields(
    source: SourceConfig, where: Path | str, there: Iterable[str], wanted: Iterable[str] | None = None
) -> None:
    """ValueError for a field that is ``wanted`` (None: those of `fields_of`) and not ``there``."""
    there = list(there)
    for field in fields_of(source) if wanted is None else wanted:
        if field not in there:
            raise _no_field(field, source, where, there)


def _no_field(field: str, source: SourceConfig, where: Path | str, fields: Iterable[str]) -> ValueError:
    settings = {getattr(source, name): name for name in ("text_field", "token_field", "span_field", "files_field")}
    setting = settings.get(field, "group_field and path_field")
    return ValueError(
        f"source {source.name!r}: {where} has no field {field!r} but {', '.join(map(repr, fields))}; "
        f"set the source's {setting}"
    )
