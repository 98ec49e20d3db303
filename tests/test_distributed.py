"""Several processes, and kills: slow, so apart from the quick suite (``make test-distributed``)."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moba_train import resolved
from moba_train.config import Config
from moba_train.metrics_file import read_rows
from moba_train.parallel import launch, local
from tiny import checkpoint_tensors, launch_command, run_forked, run_worker

pytestmark = pytest.mark.distributed

Runs = Callable[..., Path]


@pytest.fixture(scope="module")
def run(tiny_config_module: Config, tmp_path_factory) -> Runs:
    """Run folders by (processes, ZeRO stage), each run once and used by several tests."""
    root = tmp_path_factory.mktemp("distributed")

    def get(processes: int, zero_stage: int) -> Path:
        folder = root / f"{processes}x{zero_stage}"
        if not folder.exists():
            done = run_forked(config_of(tiny_config_module, processes, zero_stage), folder)
            assert done.returncode == 0, done.stderr
        return folder

    return get


def config_of(base: Config, processes: int, zero_stage: int) -> Config:
    config = copy.deepcopy(base)
    config.launch.processes, config.train.zero_stage = processes, zero_stage
    config.position_loss.log_every = 2
    return config


def losses(folder: Path) -> list[dict[str, float]]:
    """Every loss and gradient norm of the rows, training and held-out, position bins among them."""
    kept = re.compile(r"(train|eval)/(loss|trailing_loss|gradient_norm|position_loss/\d+)|step|tokens")
    return [
        {key: value for key, value in row.items() if kept.fullmatch(key)} for row in read_rows(folder / "metrics.jsonl")
    ]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_processes_learn_what_one_does(run: Runs, zero_stage: int) -> None:
    one, two = losses(run(1, 0)), losses(run(2, zero_stage))
    assert [row.keys() for row in one] == [row.keys() for row in two]
    assert any(key.startswith("train/position_loss/") for row in one for key in row)
    for expected, got in zip(one, two, strict=True):
        assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_two_processes_resume_to_the_same_bits(
    run: Runs, tiny_config_module: Config, tmp_path: Path, zero_stage: int
) -> None:
    whole = run(2, zero_stage)
    folder = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoints/step_00000002", folder / "checkpoints/step_00000002")
    shutil.copy(whole / "metrics.jsonl", folder)
    done = run_forked(config_of(tiny_config_module, 2, zero_stage), folder)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 2" in done.stderr
    assert_same_checkpoint(folder, whole)
    assert losses(folder) == losses(whole)


def assert_same_checkpoint(folder: Path, expected: Path) -> None:
    name = "checkpoints/step_00000006"
    one, two = checkpoint_tensors(folder / name), checkpoint_tensors(expected / name)
    assert one.keys() == two.keys() and any("exp_avg" in key for key in one)
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    for file in (expected / name).glob("rank_*.json"):
        assert (folder / name / file.name).read_text() == file.read_text()


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_the_export_is_whole_under_zero(run: Runs, zero_stage: int) -> None:
    expected, got = (load_file(run(*which) / "model/model.safetensors") for which in ((1, 0), (2, zero_stage)))
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)
    model, info = AutoModelForCausalLM.from_pretrained(run(2, zero_stage) / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(tensor, got[name]) for name, tensor in model.state_dict().items())


def test_one_process_goes_on_from_a_checkpoint_of_two(run: Runs, tiny_config_module: Config, tmp_path: Path) -> None:
    """As a user sees it; tests/test_resize.py goes through the sizes."""
    folder = tmp_path / "one"
    shutil.copytree(run(2, 1) / "checkpoints/step_00000002", folder / "checkpoints/step_00000002")
    shutil.copy(run(2, 1) / "metrics.jsonl", folder)
    done = run_worker(config_of(tiny_config_module, 1, 0), folder)
    assert done.returncode == 0, done.stderr
    assert "was saved with ZeRO 1 over 2 ranks; this run has ZeRO 0: converting it" in done.stderr
    for expected, got in zip(losses(run(2, 1)), losses(folder), strict=True):
        assert got == pytest.approx(expected, rel=1e-6)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        f"step_{step:08d}" for step in (2, 4, 6)
    ]


def test_an_error_of_all_ranks_is_told_once(run: Runs, tiny_config_module: Config, tmp_path: Path) -> None:
    folder = tmp_path / "three"
    shutil.copytree(run(1, 0) / "checkpoints/step_00000002", folder / "checkpoints/step_00000002")
    (folder / "checkpoints/step_00000002/state.json").unlink()
    done = run_worker(config_of(tiny_config_module, 2, 0), folder)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ") or "Traceback" in line]
    assert len(lines) == 1 and "none of the 1 checkpoints" in lines[0], done.stderr


FAULTY = """
import os, sys
from moba_train import train_step, worker
step_engine = train_step.step_engine
def planted(engine, settings):
    if engine.global_steps == 2 and os.environ["RANK"] == "1":
        raise FloatingPointError("planted")
    return step_engine(engine, settings)
train_step.step_engine = planted
worker._GIVE_WAY_SECONDS |= {"rank 0": 15.0, "others": 2.0}  # where machines are slow, too
sys.exit(worker.main())
"""


def test_an_error_of_one_rank_names_it(tiny_config_module: Config, tmp_path: Path, capfd, monkeypatch) -> None:
    config = config_of(tiny_config_module, 2, 0)
    file = tmp_path / resolved.FILE
    file.write_text(resolved.to_yaml(config))
    monkeypatch.setattr(local, "command", lambda file: [sys.executable, "-c", FAULTY, "--config", str(file)])
    assert launch.run(config.launch, file) == 3
    error = capfd.readouterr().err
    assert "error: rank 1: planted\n" in error and error.count("error:") == 1
    assert "Traceback" not in error


def workers_of(folder: Path) -> list[int]:
    """Processes whose command line names this run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue  # it has just ended
    return [pid for pid in found if pid != os.getpid()]


def start(config: Config, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / resolved.FILE).write_text(resolved.to_yaml(config))
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(launch_command(folder), stdout=log, stderr=log)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.05)


def test_a_signal_to_the_launcher_ends_all_processes(tiny_config_module: Config, tmp_path: Path) -> None:
    config = config_of(tiny_config_module, 2, 0)
    config.schedule.stages[0].tokens = 10**9
    launcher = start(config, tmp_path / "run")
    try:
        wait_for((tmp_path / "run/checkpoints/step_00000002").exists, 120)
        assert len(workers_of(tmp_path / "run")) >= 3  # the launcher and two ranks
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=40) == 128 + signal.SIGTERM
        wait_for(lambda: not workers_of(tmp_path / "run"), 5)
    finally:
        for pid in workers_of(tmp_path / "run"):
            os.kill(pid, signal.SIGKILL)


def test_kills_at_any_time_change_nothing(run: Runs, tiny_config_module: Config, tmp_path: Path) -> None:
    """SIGKILL at random moments after start-up, then go on: the end has the bits of a run that nobody killed."""
    config = config_of(tiny_config_module, 1, 0)
    config.checkpoint.every_steps = 1
    folder = tmp_path / "run"
    dice = random.Random(os.environ.get("MOBA_TRAIN_KILL_SEED", "3"))
    command = local.command(folder / resolved.FILE)
    folder.mkdir()
    (folder / resolved.FILE).write_text(resolved.to_yaml(config))
    log = (folder / "log").open("ab")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(4):
        before = len(list(read_rows(folder / "metrics.jsonl"))) if (folder / "metrics.jsonl").exists() else 0
        worker = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        wait_for(lambda: worker.poll() is not None or grown(folder, before), 120)  # noqa: B023
        time.sleep(dice.uniform(0, 0.4))
        worker.kill()
        worker.wait()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same_checkpoint(folder, run(1, 0))
    assert losses(folder) == losses(run(1, 0))
    assert json.loads((folder / "result.json").read_text())["status"] == "completed"
    assert (
        load_file(folder / "model/model.safetensors").keys() == load_file(run(1, 0) / "model/model.safetensors").keys()
    )
    assert not list((folder / "checkpoints").glob(".*"))


def grown(folder: Path, rows: int) -> bool:
    """A run that goes on has first cut its rows, so any whole checkpoint or row of a new step counts."""
    file = folder / "metrics.jsonl"
    return file.exists() and len(list(read_rows(file))) != rows
