"""What a token store was made of, and whether its inputs would still give the same one.

The settings, the tokenizer and the sources' paths name a store's folder, so stores of other settings lie beside each
other. What may change behind those names is recorded in it: the content of every source file, and FORMAT. Files are
known by their sha256: a copy or a touched file is the same, and a store outlives the documents it was made of.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from moba_train import durable, embedded
from moba_train.config import DataConfig, SourceConfig, SourceFormat
from moba_train.data import repositories
from moba_train.data.documents import SourceFile, find_files
from moba_train.data.store import FORMAT, read_json, write_json
from moba_train.data.tokenizer import Tokenizer, load_tokenizer

INPUTS = "inputs.json"
GROUPS = ("train", "heldout", "exclude")

Found = dict[str, list[tuple[SourceConfig, list[SourceFile]]]]  # by group
Files = dict[str, list[list[list[Any]]]]  # by group, source and file: name, bytes, time of the last change (ns), sha256


def settings(data: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides a store's tokens but the content of the documents."""
    return {
        "tokenizer": tokenizer.sha256,
        "eos_id": tokenizer.eos_id,
        "append_eos": data.append_eos,
        "min_document_tokens": data.min_document_tokens,
        "heldout_fraction": 0.0 if data.heldout else data.heldout_fraction,
        "drop_duplicates": data.drop_duplicates,
        "exclude_words": data.exclude_words if data.exclude else 0,
        **{group: [describe(source) for source in getattr(data, group)] for group in GROUPS},
    }


def describe(source: SourceConfig) -> dict[str, Any]:
    """A source's settings that decide its documents. A hub dataset is taken as unchanging: pin it by name@revision."""
    about: dict[str, Any] = {"name": source.name, "format": source.format.value, "path": _own_path(source.path)}
    if source.format is SourceFormat.hub:
        about |= {"subset": source.subset, "split": source.split}
    if source.format is SourceFormat.text:
        about["encoding"] = source.encoding
    elif source.format is SourceFormat.repository:
        about |= {"file_header": source.file_header, "file_suffixes": list(source.file_suffixes)}
    elif source.token_field:
        about |= {"token_field": source.token_field, "span_field": source.span_field}
    else:
        about["text_field"] = source.text_field
    if source.group_field or source.files_field:
        fields = {"group_field": source.group_field, "files_field": source.files_field, "path_field": source.path_field}
        about |= {**fields, "file_header": source.file_header}
    if source.group_field or source.files_field or source.format is SourceFormat.repository:
        about["file_order"] = source.file_order.value
    if source.max_tokens is not None:
        about["max_tokens"] = source.max_tokens
    return about


def _own_path(path: str) -> str:
    """What comes with the package has the same name wherever it is installed."""
    root = embedded.folder("data")
    return str(Path("embedded", Path(path).relative_to(root))) if Path(path).is_relative_to(root) else path


def check_source(source: SourceConfig, tokenizer: Tokenizer) -> None:
    """
    Raises:
        ValueError: settings that do not go together, or token ids of another tokenizer.
    """
    name = f"source {source.name!r}"
    if source.max_tokens is not None and source.max_tokens < 1:
        raise ValueError(f"{name} has max_tokens={source.max_tokens}: give it at least 1, or leave the source out")
    kinds = [field for field in ("group_field", "files_field", "token_field") if getattr(source, field)]
    if kinds and source.format in (SourceFormat.text, SourceFormat.repository):
        raise ValueError(
            f"{name} has {' and '.join(kinds)} with format {source.format.value}, which has no fields: unset it"
        )
    if len(kinds) > 1:
        raise ValueError(f"{name} has {' and '.join(kinds)}: a source has at most one of these; unset the others")
    if source.format is SourceFormat.mds and kinds not in ([], ["token_field"]):
        raise ValueError(
            f"{name} has {kinds[0]}={getattr(source, kinds[0])}, which is not read with format mds: unset it"
        )
    if source.span_field and not (source.token_field and source.format is SourceFormat.mds):
        raise ValueError(
            f"{name} has span_field={source.span_field}, which goes with format mds and a token_field: unset it"
        )
    if not source.token_field:
        return
    if not source.tokenizer:
        raise ValueError(
            f"{name} has token ids (token_field={source.token_field}): set its tokenizer to the one that made them"
        )
    if load_tokenizer(source.tokenizer).text_sha256() != tokenizer.text_sha256():
        raise ValueError(
            f"{name} holds token ids of {source.tokenizer}, and the model's tokenizer {tokenizer.path} gives others: "
            "take a model with that tokenizer, or a source of texts"
        )


def folder_name(name: str, wanted: dict[str, Any]) -> str:
    return f"{name}-{hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]}"


def write(folder: Path, wanted: dict[str, Any], tokenizer_path: str, files: Files) -> None:
    """Record what the store in ``folder`` is being made of."""
    content = {"format": FORMAT, "tokenizer_path": tokenizer_path, "settings": wanted, "files": files}
    write_json(folder / INPUTS, content)


def read(folder: Path) -> dict[str, Any] | None:
    """What `write` recorded; None where nothing was begun."""
    file = folder / INPUTS
    return read_json(file, folder, "format", "files") if file.is_file() else None


def summary(files: list[list[Any]]) -> dict[str, Any]:
    """A source's files in a manifest: how many, and one sha256 of all their names and contents."""
    content = json.dumps([[name, digest] for name, _, _, digest in files])
    return {"files": len(files), "files_sha256": hashlib.sha256(content.encode()).hexdigest()}


def fingerprint(found: Found) -> Files:
    """The content of every file, read once, several at a time: a few percent of the time that tokenising takes."""
    with ThreadPoolExecutor(4) as pool:

        def of_source(source: SourceConfig, files: list[SourceFile]) -> list[list[Any]]:
            digests = pool.map(lambda file: sha256(source, file), files)
            return [[file.name, file.bytes, file.changed, digest] for file, digest in zip(files, digests, strict=True)]

        return {group: [of_source(*one) for one in sources] for group, sources in found.items()}


def sha256(source: SourceConfig, file: SourceFile) -> str:
    """Of a file; of a repository's folder, over the names and contents that are read from it."""
    try:
        if not file.path.is_dir():
            return durable.sha256(file.path)
        read = repositories.files(source, file.path)
        parts = sorted((name, hashlib.sha256(content).hexdigest()) for name, content in read)
    except OSError as error:
        raise ValueError(f"source {source.name!r}: {file.path} cannot be read ({error.strerror})") from error
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def changes(folder: Path, data: DataConfig) -> list[str]:
    """What changed since the store in ``folder`` was begun, in words; nothing where none was.

    Sources whose documents are no longer in place count as unchanged. Files that were touched only get their new time
    into the record, so that they are not read again.
    """
    made = read(folder)
    if made is None:
        return []
    if made["format"] != FORMAT:
        return [f"it is of another version of moba_train (store format {made['format']}, now {FORMAT})"]
    found: list[str] = []
    touched = False
    for group in GROUPS:
        for source, recorded in zip(getattr(data, group), made["files"][group], strict=True):
            now = _files_in_place(source)
            if now is None:
                continue
            differing, times = _compare(source, recorded, now)
            found += [f"{group} source {source.name!r}: {what}" for what in differing]
            touched |= times
    if touched and not found:
        with suppress(OSError):  # a store that only others may write to serves as well
            write_json(folder / INPUTS, made)
    return found


def _files_in_place(source: SourceConfig) -> list[SourceFile] | None:
    try:
        return find_files(source)
    except ValueError:  # moved or deleted: the store has what was in them
        return None


def _compare(source: SourceConfig, recorded: list[list[Any]], now: list[SourceFile]) -> tuple[list[str], bool]:
    """What differs, and whether files with the same content have a new time, which then is in ``recorded``."""
    old, new = {entry[0]: entry for entry in recorded}, {file.name: file for file in now}
    changed, touched = [], False
    for name in old.keys() & new.keys():
        file, entry = new[name], old[name]
        if [file.bytes, file.changed] == entry[1:3]:
            continue
        # Of a folder's files some are not read (pictures), so only the content of the others tells.
        if (file.bytes == entry[1] or file.path.is_dir()) and sha256(source, file) == entry[3]:
            entry[1:3] = [file.bytes, file.changed]
            touched = True
        else:
            changed.append(name)
    groups = {"changed": changed, "new": list(new.keys() - old.keys()), "gone": list(old.keys() - new.keys())}
    found = [f"{min(names)} is {how}" for how, names in groups.items() if len(names) == 1]
    return found + [
        f"{len(names)} files are {how}, {min(names)} among them" for how, names in groups.items() if len(names) > 1
    ], touched


def others(folder: Path, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The other stores of the same data name, with their records; the newest first."""
    records = [file for file in folder.parent.glob(f"{glob.escape(name)}-*/{INPUTS}") if file.parent != folder]
    for file in sorted(records, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        yield file.parent, read_json(file, file.parent, "format")


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Between the `settings` of two stores, in words."""
    found = [
        f"{key} {_short(before.get(key))} -> {_short(value)}"
        for key, value in after.items()
        if not isinstance(value, list) and before.get(key) != value
    ]
    for group in GROUPS:
        old, new = ({source["name"]: source for source in inputs.get(group, [])} for inputs in (before, after))
        for name in sorted(old.keys() | new.keys()):
            found += [f"{group} source {name!r} {what}" for what in _of_source(old.get(name), new.get(name))]
    return found


def _of_source(old: dict[str, Any] | None, new: dict[str, Any] | None) -> list[str]:
    if old is None or new is None:
        return ["is new" if old is None else "is gone"]
    keys = sorted(old.keys() | new.keys())
    return [f"{key} {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def _short(value: Any) -> str:
    return str(value)[:12]  # of a tokenizer's sha256 that is enough
