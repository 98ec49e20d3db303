"""The token store on disk: how it is laid out, written shard by shard, and opened.

A store is a folder:

    00000.tokens          token ids of whole documents, one after another, little-endian uint16 or uint32
    00000.documents.npy   int64 (documents, 3): tokens of the document (its end-of-text token included), source index,
                          digest of its text (filters.py)
    00000.json            the shard's record; it makes the shard count, and says where to go on reading
    …
    manifest.json         written last: a store without it is unfinished and cannot be opened

Every file is written under a temporary name, flushed to disk and renamed, a shard's record after its two files.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from moba_train import durable

FORMAT = 3  # raised too where the same inputs would give other tokens
MANIFEST = "manifest.json"
_NEEDED = ("vocab_size", "eos_id", "tokens", "sha256", "shards")  # of a manifest


class TokenStore:
    """A finished store, memory-mapped. Opening reads the manifest and the document lengths only.

    ``lengths`` (documents,) int64 tokens and ``sources`` (documents,) int64 indices into ``manifest["sources"]``.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.vocab_size: int = manifest["vocab_size"]
        self.eos_id: int = manifest["eos_id"]
        self.tokens: int = manifest["tokens"]
        self._dtype = _dtype(self.vocab_size)
        names = [shard["name"] for shard in manifest["shards"]]
        for shard in manifest["shards"]:
            file = path / f"{shard['name']}.tokens"
            expected = shard["tokens"] * self._dtype.itemsize
            size = file.stat().st_size if file.exists() else 0
            if size != expected:
                raise ValueError(f"{file} has {size} bytes, not {expected}; delete {path} and prepare it again")
        self.lengths, self.sources = _read_columns(path, names, 0, 1)
        self._names = names
        self._shard_documents = np.cumsum([0, *(shard["documents"] for shard in manifest["shards"])])
        # Offsets from the start of the document's own shard.
        shard_tokens = np.cumsum([0, *(shard["tokens"] for shard in manifest["shards"])])
        whole = len(self.lengths) == self._shard_documents[-1]
        if not (whole and np.array_equal(_sums(self.lengths, self._shard_documents), np.diff(shard_tokens))):
            raise ValueError(f"the document lengths in {path} are damaged; delete {path} and prepare it again")
        self._starts = np.cumsum(self.lengths)
        self._starts -= self.lengths
        self._starts -= np.repeat(shard_tokens[:-1], np.diff(self._shard_documents))
        self._maps: dict[int, np.ndarray] = {}

    @classmethod
    def open(cls, path: str | Path) -> TokenStore:
        """
        Raises:
            ValueError: no store, an unfinished or a damaged one, or one of another format.
        """
        path = Path(path)
        file = path / MANIFEST
        if not file.is_file():
            raise ValueError(f"{path} has no {MANIFEST}: no token store, or an unfinished one; prepare the data first")
        manifest = read_json(file, path, "format", *_NEEDED)
        if manifest["format"] != FORMAT:
            raise ValueError(f"{path} has store format {manifest['format']}, not {FORMAT}; prepare the data again")
        return cls(path, manifest)

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> np.ndarray:
        """The document's token ids, a read-only view of the mapped file."""
        shard = int(np.searchsorted(self._shard_documents, index, side="right")) - 1
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.path / f"{self._names[shard]}.tokens", self._dtype, mode="r")
        start = self._starts[index]
        return self._maps[shard][start : start + self.lengths[index]]

    def digests(self) -> np.ndarray:
        """(documents,) int64: the digest of each document's text."""
        return _read_columns(self.path, self._names, 2)[0]

    def verify(self) -> None:
        """Read every shard and compare its sha256 with the manifest's."""
        for shard in self.manifest["shards"]:
            for suffix, digest in shard["sha256"].items():
                file = self.path / f"{shard['name']}.{suffix}"
                if (found := durable.sha256(file)) != digest:
                    raise ValueError(f"{file}: sha256 {found}, not {digest}; delete {self.path} and prepare it again")


class StoreWriter:
    """Appends documents to the store at ``path``, going on after the last whole shard of an interrupted writer.

    A shard is closed by the first document that brings it to ``shard_bytes``. With each shard goes a ``state`` of the
    caller's (where it is in its sources, what it has counted); ``self.state`` is the newest one found, or None.
    """

    def __init__(self, path: Path, vocab_size: int, shard_bytes: int) -> None:
        self.path = path
        self.dtype = _dtype(vocab_size)
        self._shard_bytes = shard_bytes
        self._vocab_size = vocab_size
        path.mkdir(parents=True, exist_ok=True)
        self.shards: list[dict[str, Any]] = []
        self.state: dict[str, Any] | None = None
        while (record := path / f"{len(self.shards):05d}.json").is_file():
            content = read_json(record, path, "shard", "state")
            self.shards.append(content["shard"])
            self.state = content["state"]
        kept = {f"{shard['name']}.{suffix}" for shard in self.shards for suffix in ("tokens", "documents.npy", "json")}
        for file in path.iterdir():
            if file.name not in kept:
                file.unlink()
        self._open_shard()

    def _open_shard(self) -> None:
        self._stream: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self._documents: list[tuple[int, int, int]] = []
        self._tokens = 0
        self._max_id = -1

    def digests(self) -> np.ndarray:
        """(documents,) int64: the digests of the documents in whole shards."""
        return _read_columns(self.path, [shard["name"] for shard in self.shards], 2)[0]

    def add(self, parts: list[np.ndarray], source: int, digest: int = 0) -> bool:
        """Append one document, given in parts. True when its shard is now full: the caller then calls `close_shard`."""
        if self._stream is None:
            self._stream = (self.path / "next.tokens").open("wb")
        length = 0
        for part in parts:
            self._max_id = max(self._max_id, int(part.max()) if len(part) else -1)
            if self._max_id >= self._vocab_size:  # two bytes would wrap it round unseen
                raise ValueError(
                    f"token id {self._max_id} in a vocabulary of {self._vocab_size}; fix the tokenizer that made it"
                )
            content = np.ascontiguousarray(part, self.dtype).data
            self._stream.write(content)
            self._hash.update(content)
            length += len(part)
        self._documents.append((length, source, digest))
        self._tokens += length
        return self._tokens * self.dtype.itemsize >= self._shard_bytes

    def close_shard(self, state: dict[str, Any]) -> None:
        """Make what was added since the last shard durable, with ``state``. Nothing to do where nothing was added."""
        if self._stream is None:
            return
        _sync_and_close(self._stream)
        name = f"{len(self.shards):05d}"
        table = self.path / "next.documents.npy"
        stream = table.open("wb")
        np.save(stream, np.array(self._documents, np.int64))
        _sync_and_close(stream)
        shard = {
            "name": name,
            "tokens": self._tokens,
            "documents": len(self._documents),
            "max_id": self._max_id,
            "sha256": {
                "tokens": self._hash.hexdigest(),
                "documents.npy": hashlib.sha256(table.read_bytes()).hexdigest(),
            },
        }
        os.replace(self.path / "next.tokens", self.path / f"{name}.tokens")
        os.replace(table, self.path / f"{name}.documents.npy")
        durable.flush(self.path)  # the record below must not outlive the names it speaks of
        write_json(self.path / f"{name}.json", {"shard": shard, "state": state})
        self.shards.append(shard)
        self.state = state
        self._open_shard()

    def finish(self, about: dict[str, Any]) -> None:
        """Write the manifest: ``about`` and what the store holds."""
        manifest = {
            "format": FORMAT,
            **about,
            "vocab_size": self._vocab_size,
            "dtype": self.dtype.str,
            "tokens": sum(shard["tokens"] for shard in self.shards),
            "documents": sum(shard["documents"] for shard in self.shards),
            "max_id": max((shard["max_id"] for shard in self.shards), default=-1),
            # What tells stores of other content apart, wherever they lie.
            "sha256": hashlib.sha256(json.dumps([shard["sha256"] for shard in self.shards]).encode()).hexdigest(),
            "shards": self.shards,
        }
        write_json(self.path / MANIFEST, manifest)


def _dtype(vocab_size: int) -> np.dtype:
    """Of the token ids on disk."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _sums(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """(parts,) the sum of each part of ``values`` between two ``bounds``."""
    return np.diff(np.concatenate([[0], np.cumsum(values)])[bounds])


def _read_columns(path: Path, names: list[str], *numbers: int) -> list[np.ndarray]:
    """(documents,) int64 each: columns of the shards' tables, which are not in memory all at once."""
    columns: list[list[np.ndarray]] = [[] for _ in numbers]
    for name in names:
        file = path / f"{name}.documents.npy"
        try:
            table = np.load(file)
            for column, number in zip(columns, numbers, strict=True):
                column.append(table[:, number].copy())
        except (OSError, EOFError, ValueError, IndexError) as error:
            raise ValueError(f"{file} cannot be read ({error}); delete {path} and prepare it again") from None
    return [np.concatenate(column) if column else np.empty(0, np.int64) for column in columns]


def read_json(file: Path, folder: Path, *keys: str) -> dict[str, Any]:
    """
    Raises:
        ValueError: ``file`` is no JSON with these ``keys``, though it is written whole or not at all: ``folder`` was
            damaged since.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
        problem = "" if isinstance(content, dict) else "no JSON object"
        problem = problem or ", ".join(f"no {key}" for key in keys if key not in content)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise ValueError(f"{file} is damaged ({problem}); delete {folder} and prepare it again")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``path`` whole or not at all, and flush it and its name to disk."""
    durable.write(path, json.dumps(content, indent=1))  # in ASCII: a file's name may be no Unicode


def _sync_and_close(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
