"""MDS shards for tests, written by the format's description and apart from the reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

# What ProLong's data on the hub have.
COLUMNS = {"domain": "str", "indices": "ndarray:uint32", "input_ids": "ndarray:uint32", "length": "uint64"}


def encode_array(array: np.ndarray, encoding: str) -> bytes:
    _, *about = encoding.split(":")
    kinds = {"uint8": 8, "uint16": 16, "uint32": 32, "int32": 33, "int64": 65}
    data = b"" if about else bytes([kinds[array.dtype.name]])
    if len(about) < 2:
        widths = [width for width in range(4) if max(array.shape) < 1 << (8 << width)]
        data += bytes([array.ndim << 2 | widths[0]]) + np.array(array.shape, f"<u{1 << widths[0]}").tobytes()
    return data + array.tobytes()


def write_shard(columns: dict[str, str], samples: list[dict[str, Any]]) -> bytes:
    encoded = []
    for sample in samples:
        parts = []
        for name, encoding in columns.items():
            value = sample[name]
            if encoding == "str":
                parts.append(value.encode())
            elif encoding == "bytes":
                parts.append(value)
            elif encoding == "uint64":
                parts.append(np.uint64(value).tobytes())
            else:
                parts.append(encode_array(value, encoding))
        sizes = [len(part) for part, encoding in zip(parts, columns.values(), strict=True) if not fixed_size(encoding)]
        encoded.append(np.array(sizes, "<u4").tobytes() + b"".join(parts))
    header = json.dumps({"column_names": list(columns)}).encode()
    ends = np.cumsum([4 * (len(samples) + 2) + len(header), *map(len, encoded)])
    return np.uint32(len(samples)).tobytes() + ends.astype("<u4").tobytes() + header + b"".join(encoded)


def fixed_size(encoding: str) -> int | None:
    return 8 if encoding == "uint64" else 16 if encoding == "ndarray:int32:4" else None


def write(folder: Path, columns: dict[str, str], shards: dict[str, list[dict[str, Any]]], zstd: bool = False) -> Path:
    """A folder with index.json and its shards, by name."""
    entries = []
    for name, samples in shards.items():
        content = write_shard(columns, samples)
        entries.append(describe(name, content, columns, zstd))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if zstd:
            (folder / f"{name}.zstd").write_bytes(pa.compress(content, "zstd", asbytes=True))
        else:
            (folder / name).write_bytes(content)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    return folder


def describe(name: str, content: bytes, columns: dict[str, str], zstd: bool = False) -> dict[str, Any]:
    return {
        "column_encodings": list(columns.values()),
        "column_names": list(columns),
        "column_sizes": [fixed_size(encoding) for encoding in columns.values()],
        "compression": "zstd:7" if zstd else None,
        "format": "mds",
        "raw_data": {"basename": name, "bytes": len(content), "hashes": {}},
        "version": 2,
        "zip_data": {"basename": f"{name}.zstd"} if zstd else None,
    }


def packed(*documents: list[int]) -> dict[str, Any]:
    """A sample of several documents, as ProLong packs them."""
    ends = np.cumsum([0, *map(len, documents)])
    spans = np.stack([ends[:-1], ends[1:]], 1).astype(np.uint32)
    ids = np.array([token for document in documents for token in document], np.uint32)
    return {"domain": "book", "indices": spans, "input_ids": ids, "length": len(ids)}
