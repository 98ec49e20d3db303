"""Read MDS, the shards of MosaicML streaming: texts, or the token ids of documents (ProLong's data are of that kind).

Our own reader, because mosaicml-streaming 0.13 asks for transformers < 5, numpy < 2.2 and the libraries of five clouds,
and the format is small. By its encodings.py and reader.py (version 2), a shard is, little-endian:

    samples (uint32), then samples + 1 offsets (uint32): where each sample begins, and where the last one ends
    a JSON header, which index.json repeats
    samples: the sizes (uint32) of the columns of no fixed size, then the columns one after another

An ``ndarray:uint32`` column is a byte of 4 x dimensions + log2 of the bytes of a size, the sizes, the values; without
its :dtype, a byte for that comes first; with a :shape too, there are no sizes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moba_train.config import SourceConfig
from moba_train.data.formats import Record, check_fields, open_compressed, token_ids

INDEX = "index.json"
_DTYPES = {8: "u1", 9: "i1", 16: "u2", 17: "i2", 32: "u4", 33: "i4", 64: "u8", 65: "i8"}


def find(source: SourceConfig, path: Path) -> list[Path]:
    """The shards that are named by index.json in the folder ``path`` and in its sub-folders, each once."""
    indexes = sorted(path.rglob(INDEX))
    if not indexes:
        raise ValueError(f"source {source.name!r}: path {source.path!r} is no folder with an {INDEX} in it or below")
    shards = {file for index in indexes for file in _shards(index, index.stat().st_mtime_ns)}
    if missing := sorted(file for file in shards if not file.is_file()):
        raise ValueError(f"source {source.name!r}: {missing[0]}, which its {INDEX} names, is not there; download it")
    return sorted(shards)


def read(source: SourceConfig, path: Path) -> Iterator[Record]:
    """The documents of a shard. ``row`` counts them: with a span_field, a sample holds several."""
    shard = _description(path)
    wanted = [field for field in (source.token_field or source.text_field, source.span_field) if field]
    check_fields(source, path, shard["column_names"], wanted)
    content = _content(path, shard)
    samples = int(np.frombuffer(content, "<u4", 1)[0])
    ends = np.frombuffer(content, "<u4", samples + 1, offset=4).tolist()
    row = 0
    for sample in range(samples):
        where, share = f"{path} sample {sample}", sample / samples
        try:
            columns = _decode(content[ends[sample] : ends[sample + 1]], shard, wanted)
            documents = _documents(source, *columns)
        except (ValueError, IndexError, KeyError) as error:  # UnicodeDecodeError is a ValueError
            yield Record(0, row, None, f"{where} cannot be decoded ({error})", share)
            row += 1
            continue
        for document in documents:
            text = document if isinstance(document, str) else ""
            yield Record(0, row, text, "", share, tokens=None if isinstance(document, str) else document)
            row += 1


def _documents(source: SourceConfig, content: Any, spans: np.ndarray | None = None) -> list[str] | list[np.ndarray]:
    if not source.token_field:
        if not isinstance(content, str):
            raise ValueError(f"column {source.text_field!r} holds no text; set token_field where it holds token ids")
        return [content]
    ids = token_ids(content)
    if spans is None:
        return [ids]
    bounds = np.asarray(spans).reshape(-1, 2).tolist()
    if not all(0 <= start <= end <= len(ids) for start, end in bounds):
        raise ValueError(f"column {source.span_field!r} reaches past the {len(ids)} tokens of its sample")
    return [ids[start:end] for start, end in bounds]


@functools.lru_cache(maxsize=8)
def _shards(index: Path, changed: int) -> dict[Path, dict[str, Any]]:
    """The shards of an index.json that was ``changed`` then (ns): the file that is there, whole or compressed, and what
    it says of it."""
    del changed  # part of the key alone
    try:
        shards = json.loads(index.read_text("utf-8"))["shards"]
        found = {}
        for shard in shards:
            if shard["format"] != "mds" or shard["version"] != 2:
                raise ValueError(f"format {shard['format']!r}, version {shard['version']}")
            names = [index.parent / shard[key]["basename"] for key in ("raw_data", "zip_data") if shard[key]]
            found[next((name for name in names if name.is_file()), names[0])] = shard
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} describes no MDS shards of version 2 ({error})") from error
    return found


def _description(path: Path) -> dict[str, Any]:
    """What the nearest index.json that names the shard says of it."""
    for index in (folder / INDEX for folder in path.parents):
        if index.is_file() and path in (shards := _shards(index, index.stat().st_mtime_ns)):
            return shards[path]
    raise FileNotFoundError(f"no {INDEX} names {path}")


def _content(path: Path, shard: dict[str, Any]) -> bytes:
    if path.name == Path(shard["raw_data"]["basename"]).name:
        content = path.read_bytes()
    elif (shard["compression"] or "").startswith("zstd"):
        with path.open("rb") as raw:
            content = open_compressed(path.with_suffix(".zst"), raw).read()
    else:
        raise OSError(f"its compression {shard['compression']} is not read here; zstd is, or none")
    if len(content) != shard["raw_data"]["bytes"]:
        raise EOFError(f"{len(content)} bytes, not the {shard['raw_data']['bytes']} of {INDEX}")
    return content


def _decode(sample: bytes, shard: dict[str, Any], wanted: list[str]) -> list[Any]:
    """The ``wanted`` columns of a sample, in their order."""
    fixed = shard["column_sizes"]
    unfixed = [index for index, size in enumerate(fixed) if not size]
    sizes = dict(zip(unfixed, np.frombuffer(sample, "<u4", len(unfixed)).tolist(), strict=True))
    at = 4 * len(unfixed)
    values = {}
    for index, (name, encoding) in enumerate(zip(shard["column_names"], shard["column_encodings"], strict=True)):
        size = fixed[index] or sizes[index]
        if name in wanted:
            values[name] = _value(sample[at : at + size], encoding)
        at += size
    if at != len(sample):
        raise ValueError(f"its columns have {at} bytes, the sample {len(sample)}")
    return [values[name] for name in wanted]


def _value(data: bytes, encoding: str) -> Any:
    kind, *about = encoding.split(":")
    if kind == "str":
        return data.decode("utf-8")
    if kind != "ndarray":
        raise ValueError(f"the encoding {encoding} is neither str nor ndarray")
    at = 0
    if about:
        dtype = np.dtype(about[0]).newbyteorder("<")
    else:
        dtype, at = np.dtype("<" + _DTYPES[data[0]]), 1
    if len(about) > 1:
        shape = [int(size) for size in about[1].split(",")]
    else:
        width, dimensions = 1 << (data[at] & 3), data[at] >> 2
        shape = np.frombuffer(data, f"<u{width}", dimensions, offset=at + 1).tolist()
        at += 1 + width * dimensions
    return np.frombuffer(data, dtype, offset=at).reshape(shape)
