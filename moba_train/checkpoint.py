"""Save and restore everything a step needs, so that a resumed run equals an uninterrupted one.

The protocol: all ranks write into ``.step_N.partial``; rank 0 then writes ``manifest.json`` with every file's size and
SHA-256, flushes all to disk and renames the folder to ``step_N``. A folder with that name is therefore whole, and the
newest one that verifies is the one to go on from; there is no pointer file to be wrong. An old one loses its name
before its files. A kill at any point leaves at most ``.partial`` folders, which the next save removes.

    step_00000100/
      engine/…          DeepSpeed's own files: parameters, optimizer state
      rank_00000.json   a rank's random-number generators
      state.json        step, content of the token stores, times, and the layout of the engine's files
      manifest.json     size and SHA-256 of each of these

The engine's files are laid out by rank and ZeRO stage. A run that goes on with others converts them, once, into a
``step_00000100.universal`` beside the checkpoint, by the same protocol; the next save removes it.
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moba_train import durable
from moba_train.parallel import nvme, universal
from moba_train.runtime import Runtime, log

_NAME = re.compile(r"step_(\d{8,})")
_TAG = "engine"
_UNIVERSAL = ".universal"  # ending of a converted checkpoint's name
_POLL_SECONDS = 0.5
_WRITER_ERROR = re.compile("PytorchStreamWriter|unexpected pos")  # how torch.save's RuntimeError tells of a full disk


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file."""


def save(folder: Path, engine, state: dict[str, Any], keep: int, runtime: Runtime) -> Path:
    """Commit a checkpoint of step ``state["step"]`` under ``folder``; keep the newest ``keep``. All ranks call it.

    Raises:
        CheckpointError: it could not be written, or the disk has no room for it; the checkpoints before it stand.
    """
    final = folder / f"step_{state['step']:08d}"
    partial = _partial(final)
    _refuse_full_disk(folder, final, runtime)
    try:
        if runtime.is_main:
            folder.mkdir(mode=0o700, exist_ok=True)
            for left in folder.glob(".step_*.partial"):
                shutil.rmtree(left)
            partial.mkdir()
        dist.barrier()
        engine.save_checkpoint(str(partial), tag=_TAG, save_latest=False)
        _write_json(partial / f"rank_{runtime.rank:05d}.json", _random_state())
        dist.barrier()
        if runtime.is_main:
            _write_json(partial / "state.json", {**state, "layout": _layout(engine, runtime)})
            _write_json(partial / "manifest.json", _manifest(partial))
            _flush_tree(partial)
            _commit(partial, final, keep)
        dist.barrier()
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _WRITER_ERROR.search(str(error)):
            raise  # out of memory, or another rank is gone
        shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
        raise CheckpointError(
            f"checkpoint {final} could not be written ({_reason(error)}): the ones before it stand; make room, or mend "
            f"the disk, and go on with run.resume=auto"
        ) from error
    return final


def _refuse_full_disk(folder: Path, final: Path, runtime: Runtime) -> None:
    """A save needs the room of the one before it: told on all ranks before anything is written."""
    lacking: list[Any] = [None]
    if runtime.is_main and (committed := list_checkpoints(folder)):
        needed = sum(file.stat().st_size for file in committed[-1].rglob("*") if file.is_file())
        free = shutil.disk_usage(folder).free
        if free < needed:
            lacking = [f"{free / 1e9:.3g} GB are free on its disk, and {committed[-1].name} took {needed / 1e9:.3g} GB"]
    dist.broadcast_object_list(lacking, src=0, device=runtime.device)
    if lacking[0]:
        raise CheckpointError(
            f"checkpoint {final} would not fit ({lacking[0]}): the ones before it stand; make room, and go on "
            f"with run.resume=auto"
        )


def _commit(partial: Path, final: Path, keep: int) -> None:
    """Give ``partial`` its name, then remove what is no longer kept."""
    folder = final.parent
    if final.exists():  # damaged: the run went on from an older one and came here again
        _remove(final)
    os.rename(partial, final)
    durable.flush(folder)
    committed = list_checkpoints(folder)
    here = committed.index(final) + 1
    # Those of later steps were damaged and passed over, like one of this very step.
    for old in committed[: max(0, here - keep)] + committed[here:] + list(folder.glob(f"step_*{_UNIVERSAL}")):
        _remove(old)


def _remove(path: Path) -> None:
    nameless = _partial(path).with_suffix(".removed.partial")
    os.rename(path, nameless)
    shutil.rmtree(nameless)


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=lambda p: int(p.name[5:]))


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose files all match its manifest; damaged ones are named in the log and passed over.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole.
    """
    candidates = list_checkpoints(folder)
    for path in reversed(candidates):
        try:
            verify(path)
        except CheckpointError as error:
            log.warning("checkpoint passed over: %s", error)
        else:
            return path
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {folder} is whole: start anew in another run.name"
        )
    return None


def newest_for_all(folder: Path, runtime: Runtime) -> Path | None:
    """``newest_whole`` of rank 0, on every rank; the files are read once.

    Raises:
        CheckpointError: there are checkpoints and none is whole.
    """
    found: list[Any] = [None]
    if runtime.is_main:
        try:
            found = [newest_whole(folder)]
        except CheckpointError as error:
            found = [error]
    dist.broadcast_object_list(found, src=0, device=runtime.device)
    if isinstance(found[0], CheckpointError):
        raise found[0]
    return found[0]


def verify(path: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: naming the first file that is missing, cut short or changed.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        entries = [(path / name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path / 'manifest.json'} cannot be read ({error})") from None
    if path / "state.json" not in [file for file, _, _ in entries]:
        raise CheckpointError(f"{path / 'manifest.json'} names no state.json: it is not one of a checkpoint")
    for file, size, digest in entries:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes and its manifest says {size}")
        if durable.sha256(file) != digest:
            raise CheckpointError(f"{file} does not match its SHA-256: it was changed after it was saved")


def read_state(path: Path) -> dict[str, Any]:
    """What ``save`` was given as ``state``, and the layout of the engine's files."""
    return json.loads((path / "state.json").read_text())


def load(path: Path, engine, runtime: Runtime) -> None:
    """Restore engine and random-number generators from a checkpoint of ``newest_for_all``; all ranks call it.

    Raises:
        CheckpointError: DeepSpeed finds nothing to load in it, or it cannot be converted to this run's layout.
    """
    made, wanted = read_state(path).get("layout"), _layout(engine, runtime)
    if made is None:
        raise CheckpointError(
            f"{path} was saved by an older moba_train: finish the run with that, or start anew in another run.name"
        )
    if made == wanted:
        loaded, _ = engine.load_checkpoint(str(path), tag=_TAG)
        if loaded is None:
            raise CheckpointError(f"{path / _TAG} holds nothing that DeepSpeed can load")
        if made["nvme"]:
            nvme.restore_moments(engine, str(path), _TAG)
    elif made["nvme"] or wanted["nvme"]:
        raise CheckpointError(
            f"{path} was saved with {_words(made)} and this run has {_words(wanted)}: DeepSpeed converts no state on "
            f"NVMe. Go on with what it was saved with"
        )
    else:
        log.info("%s was saved with %s; this run has %s: converting it", path, _words(made), _words(wanted))
        universal.load(_converted(path, made, engine, runtime), _TAG, engine)
    generators = sorted(path.glob("rank_*.json"))
    # A rank that the checkpoint does not know draws as another one did: ranks start alike too.
    _restore_random_state(json.loads(generators[runtime.rank % len(generators)].read_text()))


def _layout(engine, runtime: Runtime) -> dict[str, Any]:
    """What the engine's files depend on. DeepSpeed is not told of sequence parallelism, so they do not on that."""
    stage = engine.zero_optimization_stage()
    return {
        "zero_stage": stage,
        "partitions": runtime.world_size if stage else 1,
        "nvme": bool(engine.zero_nvme_offload_optimizer()),
    }


def _words(layout: dict[str, Any]) -> str:
    ranks = f" over {layout['partitions']} ranks" if layout["zero_stage"] else ""
    return f"ZeRO {layout['zero_stage']}{ranks}{' on NVMe' if layout['nvme'] else ''}"


def _converted(path: Path, made: dict[str, Any], engine, runtime: Runtime) -> Path:
    """The universal form of ``path``, made by rank 0 unless it is there; it takes minutes where a model is large."""
    final = path.with_name(path.name + _UNIVERSAL)
    if runtime.is_main and final.exists():
        try:
            verify(final)
        except CheckpointError:
            _remove(final)
    dist.barrier()
    if not runtime.is_main:
        while not final.exists():  # no collective, which would time out; where rank 0 fails, the launcher ends all
            time.sleep(_POLL_SECONDS)
        return final
    if not final.exists():
        partial = _partial(final)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            universal.convert(path / _TAG, partial / _TAG, made["zero_stage"], engine.module)
            shutil.copy(path / "state.json", partial)
            _write_json(partial / "manifest.json", _manifest(partial))
            _flush_tree(partial)
            os.rename(partial, final)
            durable.flush(final.parent)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{path} could not be converted ({_reason(error)}); it stands: make room, or go on with {_words(made)}"
            ) from error
    return final


def _reason(error: Exception) -> str:
    if not isinstance(error, OSError) and _WRITER_ERROR.search(str(error)):
        return "a file was cut short: the disk is full, or no file may be that large"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _random_state() -> dict[str, Any]:
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": json.loads(json.dumps(numpy_state, default=lambda array: array.tolist())),
        "torch": _encode(torch.get_rng_state()),
        "cuda": _encode(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy_state = state["numpy"]
    numpy_state["state"]["key"] = np.asarray(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(_decode(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": durable.sha256(file)} for file in files
    }


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value))


def _flush_tree(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        durable.flush(path)
