"""The commit protocol: whatever goes wrong between any two file operations, the newest whole checkpoint is usable."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moba_train import checkpoint
from moba_train.checkpoint import CheckpointError
from moba_train.runtime import Runtime

RUNTIME = Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


class Killed(BaseException):
    """Stands for a SIGKILL: no ``except Exception`` sees it."""


class Engine:
    """Two files, as DeepSpeed's engine writes them: straight to their place."""

    module = None

    def __init__(self, value: float = 0.0, zero_stage: int = 1, nvme: bool = False) -> None:
        self.value = value
        self.zero_optimization_stage = lambda: zero_stage
        self.zero_nvme_offload_optimizer = lambda: nvme

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest
        path = Path(folder) / tag
        path.mkdir()
        torch.save(torch.full((64,), self.value), path / "model.pt")
        torch.save(torch.full((64,), -self.value), path / "optimizer.pt")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, dict]:
        self.value = float(torch.load(Path(folder) / tag / "model.pt")[0])
        return folder, {}


@pytest.fixture(scope="module", autouse=True)
def _group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save(folder: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save(folder, Engine(step), {"step": step}, keep, RUNTIME)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest_step(folder: Path) -> int:
    path = checkpoint.newest_whole(folder)
    assert path is not None
    engine = Engine()
    checkpoint.load(path, engine, RUNTIME)
    step = checkpoint.read_state(path)["step"]
    assert engine.value == step
    return step


def test_the_newest_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert checkpoint.newest_whole(folder) is None
    for step in (1, 2, 3, 10):
        assert save(folder, step) == folder / f"step_{step:08d}"
    assert names(folder) == ["step_00000003", "step_00000010"]
    assert newest_step(folder) == 10
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not [file for file in tmp_path.rglob("*latest*")]


def test_random_generators_are_restored(tmp_path: Path) -> None:
    def draw() -> tuple:
        return random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist(), random.gauss(0, 1)

    random.gauss(0, 1)  # leaves a second number behind, which is state too
    path = save(tmp_path / "checkpoints", 1)
    expected = draw()
    draw()
    checkpoint.load(path, Engine(), RUNTIME)
    assert draw() == expected


def operations(monkeypatch, engine: type[Engine], fail_at: int, error: BaseException) -> list[str]:
    """Every file operation of a save, listed as it happens; the one of number ``fail_at`` raises instead."""
    seen: list[str] = []

    def watch(owner, name: str, half_done=None) -> None:
        original = getattr(owner, name)

        def operation(*arguments, **keywords):
            seen.append(name)
            if len(seen) - 1 == fail_at:
                if half_done:
                    half_done(*arguments)
                raise error
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, operation)

    def half_saved(engine, folder: str, *_) -> None:
        (Path(folder) / "engine").mkdir()
        (Path(folder) / "engine" / "model.pt").write_bytes(b"half")

    def half_removed(path: Path) -> None:
        for file in [file for file in sorted(path.rglob("*")) if file.is_file()][:1]:
            file.unlink()

    watch(engine, "save_checkpoint", half_saved)
    watch(checkpoint, "_write_json", lambda file, value: file.write_text("{"))
    watch(checkpoint.durable, "flush")
    watch(os, "rename")
    watch(shutil, "rmtree", half_removed)
    return seen


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Checkpoints of steps 1 and 2, and what a kill left of an earlier save."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        save(folder, step)
    (folder / ".step_00000009.partial").mkdir()
    return folder


def count_operations(two: Path) -> int:
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = operations(monkeypatch, Engine, -1, Killed())
        save(two, 3)
        return len(seen)


def test_a_kill_between_any_two_operations(two: Path, tmp_path: Path) -> None:
    pristine = tmp_path / "pristine"
    shutil.copytree(two, pristine)
    total = count_operations(two)
    assert total > 12
    found = []
    for number in range(total):
        shutil.rmtree(two)
        shutil.copytree(pristine, two)
        with pytest.MonkeyPatch.context() as monkeypatch:
            seen = operations(monkeypatch, Engine, number, Killed())
            with pytest.raises(Killed):
                save(two, 3)
        assert len(seen) == number + 1
        found.append(newest_step(two))
        for step in range(found[-1] + 1, 5):  # the run goes on
            save(two, step)
        assert names(two) == ["step_00000003", "step_00000004"], f"after a kill at operation {number}, {seen[-1]}"
        assert newest_step(two) == 4
    assert found == sorted(found) and set(found) == {2, 3}  # the rename is the one moment of commitment


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed\n  at x"), OSError()],
    ids=["a file", "torch.save", "no message"],
)
def test_a_failed_save_leaves_the_older_ones(two: Path, tmp_path: Path, error: Exception) -> None:
    pristine = tmp_path / "pristine"
    shutil.copytree(two, pristine)
    for number in range(count_operations(two)):
        shutil.rmtree(two)
        shutil.copytree(pristine, two)
        with pytest.MonkeyPatch.context() as monkeypatch:
            operations(monkeypatch, Engine, number, error)
            with pytest.raises(CheckpointError, match=r"step_00000003 could not be written \(.+\)") as e:
                save(two, 3)
        assert "\n" not in str(e.value)
        assert newest_step(two) in (2, 3)
        save(two, 4)
        assert newest_step(two) == 4


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("NCCL error"), RuntimeError()]
)
def test_what_is_no_fault_of_the_disk_is_not_called_one(two: Path, monkeypatch, error: Exception) -> None:
    def fails(*_, **__) -> None:
        raise error

    monkeypatch.setattr(Engine, "save_checkpoint", fails)
    with pytest.raises(type(error)) as caught:
        save(two, 3)
    assert caught.value is error
    assert newest_step(two) == 2


def damage(path: Path, how: str) -> str:
    """Damage a checkpoint; returns the words that its refusal must hold."""
    file = path / "engine" / "optimizer.pt"
    if how == "truncated":
        os.truncate(file, file.stat().st_size - 1)
        return f"{file} has "
    if how == "bit flipped":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        return f"{file} does not match"
    if how == "missing":
        file.unlink()
        return f"{file} is missing"
    if how == "swapped":
        other = file.with_name("model.pt")
        one, two = file.read_bytes(), other.read_bytes()
        file.write_bytes(two)
        other.write_bytes(one)
        return "model.pt "
    if how == "generators changed":
        (path / "rank_00000.json").write_text("{}")
        return "rank_00000.json has 2 bytes"
    manifest = path / "manifest.json"
    content_of = {
        "no manifest": None,
        "manifest cut short": manifest.read_text()[:-10],
        "manifest empty": "{}",
        "manifest a list": "[]",
        "manifest without sizes": json.dumps({"state.json": {}}),
    }
    if content_of[how] is None:
        manifest.unlink()
    else:
        manifest.write_text(content_of[how])
    return str(manifest)


DAMAGE = [
    *("truncated", "bit flipped", "missing", "swapped", "generators changed"),
    *("no manifest", "manifest cut short", "manifest empty", "manifest a list", "manifest without sizes"),
]


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_named_and_passed_over(two: Path, how: str, caplog) -> None:
    words = damage(two / "step_00000002", how)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.verify(two / "step_00000002")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert newest_step(two) == 1
    assert words in caplog.text
    damage(two / "step_00000001", how)
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints .* another run\.name"):
        checkpoint.newest_whole(two)


def test_a_damaged_checkpoint_is_replaced_when_the_run_comes_to_its_step(two: Path) -> None:
    damage(two / "step_00000002", "bit flipped")
    assert newest_step(two) == 1
    save(two, 2)
    assert newest_step(two) == 2


def test_damaged_checkpoints_do_not_count_as_kept(two: Path) -> None:
    """Later steps than the one saved can only have been passed over."""
    for step in (3, 4):
        save(two, step, keep=9)
        damage(two / f"step_{step:08d}", "missing")
    damage(two / "step_00000002", "truncated")
    assert newest_step(two) == 1
    shutil.rmtree(two / "step_00000002")
    save(two, 2, keep=1)
    assert names(two) == ["step_00000002"]


@pytest.fixture
def conversions(monkeypatch) -> list[int]:
    """Stands for DeepSpeed's universal checkpoint; lists the ZeRO stages that were converted from."""
    seen: list[int] = []

    def convert(source: Path, target: Path, zero_stage: int, module) -> None:
        seen.append(zero_stage)
        target.mkdir()
        torch.save(torch.load(source / "model.pt"), target / "universal.pt")

    def load(folder: Path, tag: str, engine: Engine) -> None:
        engine.value = float(torch.load(folder / tag / "universal.pt")[0])

    monkeypatch.setattr(checkpoint.universal, "convert", convert)
    monkeypatch.setattr(checkpoint.universal, "load", load)
    return seen


def test_another_layout_is_converted_once(two: Path, conversions: list[int], caplog) -> None:
    caplog.set_level("INFO", "moba_train")
    converted = two / "step_00000002.universal"
    for _ in range(2):
        engine = Engine(zero_stage=3)
        checkpoint.load(two / "step_00000002", engine, RUNTIME)
        assert engine.value == 2
    assert conversions == [1]
    assert "was saved with ZeRO 1 over 1 ranks; this run has ZeRO 3 over 1 ranks: converting it" in caplog.text
    checkpoint.verify(converted)
    (converted / "engine" / "universal.pt").write_bytes(b"damaged")
    checkpoint.load(two / "step_00000002", engine, RUNTIME)
    assert conversions == [1, 1] and engine.value == 2
    assert newest_step(two) == 2  # by the engine that saved it, as it is
    save(two, 3)
    assert names(two) == ["step_00000002", "step_00000003"]


def test_a_conversion_that_was_killed_begins_anew(two: Path, conversions: list[int]) -> None:
    half = two / ".step_00000002.universal.partial"
    (half / "engine").mkdir(parents=True)
    (half / "engine" / "universal.pt").write_bytes(b"half")
    engine = Engine(zero_stage=3)
    checkpoint.load(two / "step_00000002", engine, RUNTIME)
    assert (engine.value, conversions) == (2, [1]) and not half.exists()


def test_other_ranks_wait_for_the_conversion_of_rank_0(two: Path, conversions: list[int], monkeypatch) -> None:
    checkpoint.load(two / "step_00000002", Engine(zero_stage=3), RUNTIME)
    converted, away = two / "step_00000002.universal", two / "away"
    converted.rename(away)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:  # rank 0 is done
            away.rename(converted)

    monkeypatch.setattr(checkpoint.time, "sleep", sleep)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    engine = Engine(zero_stage=3)
    rank_1 = Runtime(1, 1, 1, torch.device("cpu"))  # of a world as large as the one that saved
    checkpoint.load(two / "step_00000002", engine, rank_1)
    assert engine.value == 2 and len(waited) == 3 and conversions == [1]


def test_a_checkpoint_without_a_layout_is_an_older_versions(two: Path) -> None:
    file = two / "step_00000002" / "state.json"
    file.write_text(json.dumps({"step": 2}))
    with pytest.raises(CheckpointError, match=r"step_00000002 was saved by an older moba_train: finish the run with"):
        checkpoint.load(two / "step_00000002", Engine(), RUNTIME)


def test_unpartitioned_state_is_the_same_for_any_number_of_ranks(
    tmp_path: Path, conversions: list[int], monkeypatch
) -> None:
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    two_ranks = Runtime(0, 2, 0, torch.device("cpu"))
    for stage, expected in ((0, []), (1, [1])):
        folder = tmp_path / str(stage)
        path = checkpoint.save(folder, Engine(5, stage), {"step": 1}, 2, RUNTIME)
        engine = Engine(zero_stage=stage)
        checkpoint.load(path, engine, two_ranks)
        assert engine.value == 5 and conversions == expected


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("PytorchStreamWriter failed\nmore"), "a file was cut short: the disk is full, or no file may be"),
    ],
    ids=["by the system", "by torch"],
)
def test_a_failed_conversion_leaves_the_checkpoint(two: Path, monkeypatch, error: Exception, why: str) -> None:
    def fails(source: Path, target: Path, *_) -> None:
        target.mkdir()
        (target / "half.pt").write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint.universal, "convert", fails)
    with pytest.raises(CheckpointError, match=rf"could not be converted \(.*{why}.*\); it stands: .* ZeRO 1 over"):
        checkpoint.load(two / "step_00000002", Engine(zero_stage=2), RUNTIME)
    assert names(two) == [".step_00000009.partial", "step_00000001", "step_00000002"]
    assert newest_step(two) == 2


def test_state_on_nvme_is_not_converted(two: Path) -> None:
    with pytest.raises(CheckpointError, match=r"saved with ZeRO 1 over 1 ranks and this run has ZeRO 1 .* on NVMe"):
        checkpoint.load(two / "step_00000002", Engine(nvme=True), RUNTIME)


def test_a_save_that_would_not_fit_is_refused_before_it_begins(two: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 500, 500))
    with pytest.raises(CheckpointError, match=r"step_00000003 would not fit \(5e-07 GB are free .* step_00000002 took"):
        save(two, 3)
    assert names(two) == [".step_00000009.partial", "step_00000001", "step_00000002"]
    assert newest_step(two) == 2


def test_an_engine_that_loads_nothing_is_refused(two: Path, monkeypatch) -> None:
    monkeypatch.setattr(Engine, "load_checkpoint", lambda self, folder, tag: (None, {}))
    with pytest.raises(CheckpointError, match="nothing that DeepSpeed can load"):
        checkpoint.load(two / "step_00000002", Engine(), RUNTIME)
