"""Ranks that something else has started: one makes the run directory, the others wait for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moba_train.config import LaunchConfig, LaunchKind
from moba_train.parallel import launch, local, started

RANK_1 = {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def of_environment(**settings) -> LaunchConfig:
    return LaunchConfig(kind=LaunchKind.environment, **settings)


@pytest.fixture
def environment(monkeypatch):
    for key, value in RANK_1.items():
        monkeypatch.setenv(key, value)
    return monkeypatch


def test_the_environment_says_how_many(environment) -> None:
    settled = launch.settle(of_environment())
    assert (settled.world_size, settled.nodes) == (8, 2)
    assert started.follows(settled)
    assert launch.settle(of_environment(gpus=8)).needs_gpus
    assert launch.settle(of_environment(gpus_per_node=4, nodes=2)).world_size == 8
    environment.setenv("RANK", "0")
    assert not started.follows(settled)
    assert not started.follows(LaunchConfig())


def test_an_environment_that_does_not_fit(environment) -> None:
    with pytest.raises(ValueError, match=r"launch\.processes=4 and WORLD_SIZE=8"):
        launch.settle(of_environment(processes=4))
    environment.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match="WORLD_SIZE=many"):
        launch.settle(of_environment())
    environment.delenv("RANK")
    environment.delenv("MASTER_PORT")
    with pytest.raises(ValueError, match="RANK, MASTER_PORT not set: start it with torchrun"):
        launch.settle(of_environment())


def test_waiting_takes_no_settings_of_an_earlier_start(environment, tmp_path: Path) -> None:
    file = tmp_path / "resolved.yaml"
    file.write_text("seed: 0")
    threading.Timer(0.5, file.write_text, ["seed: 1"]).start()
    began = time.monotonic()
    started.wait_for(file, "seed: 1", minutes=1)
    assert time.monotonic() - began >= 0.5
    with pytest.raises(ValueError, match=r"rank 1 waited 0\.001 minutes .*launch\.timeout_minutes"):
        started.wait_for(file, "seed: 2", minutes=0.001)


DIES_ONCE = """
import os, runpy, signal, sys
import moba_train.run
build = moba_train.run.build
def dying(*arguments):
    run = build(*arguments)
    if (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]) == ("0", "1"):
        os.kill(os.getpid(), signal.SIGKILL)
    return run
moba_train.run.build = dying
runpy.run_module("moba_train.worker", run_name="__main__")
"""


@pytest.mark.distributed
def test_under_torchrun(tiny_overrides: list[str], tmp_path: Path) -> None:
    """The command line of each rank, and then the bare worker on a resolved.yaml that is there; torchrun starts both
    ranks of that again when one is killed."""
    folder = tmp_path / "runs/started"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        port = ["--master-port", str(local.free_port())]
        return subprocess.run(
            [*torchrun, *port, *command], capture_output=True, text=True, timeout=180, env=environment
        )

    train = ["-m", "moba_train", "train", *tiny_overrides, "launch=environment"]
    done = run(*train, "run.name=started")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run directory: ") == 1 and done.stdout.count("command: ") == 1
    assert json.loads((folder / "result.json").read_text())["status"] == "completed"
    assert len(list((folder / "checkpoints").glob("*/rank_*.json"))) == 2
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["started"]

    (folder / "result.json").unlink()
    script = tmp_path / "dies_once.py"
    script.write_text(DIES_ONCE)
    bare = run("--max-restarts=1", str(script), "--config", str(folder / "resolved.yaml"))
    assert bare.returncode == 0, bare.stderr
    assert "exitcode: -9" in bare.stderr and (folder / "result.json").is_file()
