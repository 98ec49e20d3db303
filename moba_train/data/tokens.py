"""Documents → token stores, once. The same sources, settings and tokenizer give the same folder, and nothing to do.

<store_dir>/<data.name>-<hash>/
    train/      a TokenStore
    heldout/    another, where `data.heldout` or `data.heldout_fraction` asks for one
    inputs.json what both were made of
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moba_train.config import DataConfig
from moba_train.data import inputs
from moba_train.data.build import build
from moba_train.data.documents import find_files
from moba_train.data.split import NoDocument, Split
from moba_train.data.store import FORMAT, MANIFEST
from moba_train.data.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)


def prepare_store(data: DataConfig, tokenizer_path: str, progress: bool = True) -> Path:
    """The folder with ``data``'s token stores, which are made first where they are missing or unfinished; with
    ``progress`` it is said how far that is.

    A whole store serves without the documents that it was made of.

    Raises:
        ValueError: a source is missing, empty, without its text field or too often bad; or the documents, the tokenizer
            or this code changed since the store was made, and data.rebuild does not ask for another.
    """
    if not data.train:
        raise ValueError("data.train names no source; give it one, or choose a data config that has some")
    if not 0 <= data.heldout_fraction < 1:
        raise ValueError(f"data.heldout_fraction is {data.heldout_fraction}; it must be from 0 to below 1")
    if data.threads:
        os.environ["RAYON_NUM_THREADS"] = str(data.threads)  # read once, when tokenizers first encodes a batch
    tokenizer = load_tokenizer(tokenizer_path)
    wanted = inputs.settings(data, tokenizer)
    folder = Path(data.store_dir) / inputs.folder_name(data.name, wanted)
    finished = _is_finished(folder, data)
    changes = inputs.changes(folder, data)
    if changes and finished and not data.rebuild:
        raise ValueError(
            f"the token store {folder} was made of something else: {'; '.join(changes)}. Set data.rebuild=true to make "
            "it anew, or data.name to keep it beside the new one"
        )
    if finished and not changes:
        if progress:
            log.info("the token store %s is complete: nothing to prepare", folder)
        return folder
    for group in inputs.GROUPS:
        for source in getattr(data, group):
            inputs.check_source(source, tokenizer)
    found = {group: [(source, find_files(source)) for source in getattr(data, group)] for group in inputs.GROUPS}
    try:
        Path(data.store_dir).mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _make(folder, data, found, tokenizer, wanted, progress)
    except OSError as error:  # of writing: what goes wrong in reading is a ValueError already
        raise ValueError(f"data.store_dir {data.store_dir!r} cannot be written: {error.strerror}") from error
    return folder


def _make(
    folder: Path,
    data: DataConfig,
    found: inputs.Found,
    tokenizer: Tokenizer,
    wanted: dict[str, Any],
    progress: bool,
) -> None:
    """Under the lock: begin, go on, or begin anew, unless another process did it meanwhile."""
    if changes := inputs.changes(folder, data):
        log.warning("making %s anew: %s", folder, "; ".join(changes))
        shutil.rmtree(folder)
    if _is_finished(folder, data):
        return
    recorded = inputs.read(folder)
    if recorded is None:
        _compare_with_others(folder, data, tokenizer, wanted)
        folder.mkdir(exist_ok=True)
        files = inputs.fingerprint(found)
        inputs.write(folder, wanted, tokenizer.path, files)
    else:
        files = recorded["files"]
    try:
        for split in _splits(data, found):
            if not (folder / split.name / MANIFEST).is_file():
                build(folder, split, data, tokenizer, files, progress)
    except NoDocument:
        shutil.rmtree(folder)
        raise


def _splits(data: DataConfig, found: inputs.Found) -> list[Split]:
    """The splits to make: held-out first, as what it holds is kept out of the other."""
    fraction = 0.0 if data.heldout else data.heldout_fraction
    splits = [Split("train", found["train"], lambda draw: draw >= fraction, "train")]
    if data.heldout:
        splits.insert(0, Split("heldout", found["heldout"], lambda draw: True, "heldout"))
    elif fraction:
        splits.insert(0, Split("heldout", found["train"], lambda draw: draw < fraction, "train", fraction))
    return splits


def _is_finished(folder: Path, data: DataConfig) -> bool:
    names = ["train", "heldout"] if data.heldout or data.heldout_fraction else ["train"]
    return all((folder / name / MANIFEST).is_file() for name in names)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however it ends."""
    with (folder.parent / f".{folder.name}.lock").open("w") as stream:  # not inside: the folder may be removed
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process prepares %s; waiting for it", folder)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _compare_with_others(folder: Path, data: DataConfig, tokenizer: Tokenizer, wanted: dict[str, Any]) -> None:
    """What a new store has to do with those of the same data name that are there."""
    told = False
    for other, made in inputs.others(folder, data.name):
        if made["format"] != FORMAT:
            log.warning(
                "%s was made by another version (store format %s, now %s): remove it", other, made["format"], FORMAT
            )
            continue
        differing = inputs.differences(made["settings"], wanted)
        only_tokenizer = made["settings"] | {"tokenizer": tokenizer.sha256} == wanted
        if only_tokenizer and made["tokenizer_path"] == tokenizer.path and not data.rebuild:
            raise ValueError(
                f"the tokenizer {tokenizer.path} changed since the token store {other} was made with it "
                f"({differing[0]}). Restore it, or set data.rebuild=true to make another store"
            )
        if not told:
            log.info("%s is new beside %s: %s", folder, other, "; ".join(differing))
            told = True
