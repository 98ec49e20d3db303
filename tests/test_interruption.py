"""Two ranks that are told to stop, stand still, are slow or are traced: nothing is lost, and the rank is named."""

from __future__ import annotations

import copy
import gzip
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moba_train import resolved, worker
from moba_train.config import Config
from moba_train.metrics_file import read_rows
from moba_train.parallel.watchdog import EXIT_CODE
from test_distributed import assert_same_checkpoint, losses
from tiny import run_forked, run_worker

ASLEEP = """
import time
from moba_train.parallel.watchdog import Watchdog
def where_it_hangs():
    time.sleep(60)
dog = Watchdog(rank=3, minutes=0.02)
time.sleep(1.5)
for step in range(4):
    time.sleep(0.5)
    dog.beat(f"step {step}")
where_it_hangs()
"""

# A rank of a run in which ``FAULT`` is executed before every step.
FAULTY = """
import os, signal, sys, time
from moba_train import observe, train, worker
observe.PERSISTENT_STEPS = 3
rank, optimize = int(os.environ["RANK"]), train.optimize
def planted(run):
    FAULT
    return optimize(run)
train.optimize = planted
sys.exit(worker.main())
"""
LAUNCHER = """
import sys
from pathlib import Path
from moba_train import resolved, worker
from moba_train.parallel import launch, local
local.command = lambda file: [sys.executable, "-c", sys.argv[2], "--config", str(file)]
file = Path(sys.argv[1])
sys.exit(launch.run(resolved.load(file).launch, file))
"""
SLOW_AND_STOPPED = """
    next_step = run.loader.next_step
    run.loader.next_step = lambda rows: (time.sleep(0.3 * rank), next_step(rows))[1]
    if rank == 1 and run.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
"""


def run_faulty(config: Config, folder: Path, fault: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    (folder / resolved.FILE).write_text(resolved.to_yaml(config))
    command = [sys.executable, "-c", LAUNCHER, str(folder / resolved.FILE), FAULTY.replace("FAULT", fault.strip())]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_rank_that_hangs_says_where() -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", ASLEEP], capture_output=True, text=True, timeout=30)
    assert done.returncode == EXIT_CODE
    assert time.monotonic() - began < 15
    first, *stacks = done.stderr.splitlines()
    assert f"rank 3 on {socket.gethostname()}" in first and "step 3" in first and "launch.timeout_minutes" in first
    assert any("where_it_hangs" in line for line in stacks)


@pytest.mark.parametrize(
    ("rank", "machines", "place"),
    [(0, 1, ""), (1, 1, "rank 1: "), (0, 2, f"rank 0 on {socket.gethostname()}: ")],
    ids=["the only machine", "another rank", "one of two machines"],
)
def test_an_error_names_rank_and_machine(monkeypatch, capsys, rank: int, machines: int, place: str) -> None:
    monkeypatch.setattr(worker.time, "sleep", lambda seconds: None)
    for key, value in {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4 // machines}.items():
        monkeypatch.setenv(key, str(value))
    worker._tell("no memory")
    assert capsys.readouterr().err == f"error: {place}no memory\n"


def test_ctrl_c_in_a_rank_is_no_traceback(monkeypatch, tmp_path: Path) -> None:
    """OmegaConf's clean-up fails over it now and then, as here."""

    def interrupted(file: Path) -> Config:
        try:
            raise KeyboardInterrupt
        finally:
            raise AttributeError(file)

    monkeypatch.setattr(resolved, "load", interrupted)
    monkeypatch.setattr(sys, "argv", ["worker", "--config", str(tmp_path / "resolved.yaml")])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert worker.main() == 130


@pytest.fixture
def two_ranks(tiny_config: Config) -> Config:
    tiny_config.launch.processes = 2
    tiny_config.position_loss.log_every = 2
    return tiny_config


@pytest.mark.distributed
def test_stopped_by_a_signal_to_one_rank(two_ranks: Config, tmp_path: Path) -> None:
    """Slow, traced and told to stop, all at once: the run that goes on still equals one that was left alone."""
    config = copy.deepcopy(two_ranks)
    config.train.profile_steps = [2, 3]
    folder, alone = tmp_path / "run", tmp_path / "alone"
    done = run_faulty(config, folder, SLOW_AND_STOPPED)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "stopped by SIGTERM at step 3: run.resume=auto" in done.stderr and "Traceback" not in done.stderr
    assert (folder / "checkpoints/step_00000003").is_dir()
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]

    assert f"rank 1 on {socket.gethostname()} has been slower than the others for 3 steps" in done.stderr
    assert all(row["perf/slowest_rank"] == 1 for row in rows)
    assert all(row["perf/rank_seconds_max"] > row["perf/rank_seconds_min"] + 0.2 for row in rows)
    assert all(0 < row["perf/rank_memory_gb_min"] <= row["perf/rank_memory_gb_max"] for row in rows)

    for rank in (0, 1):  # the first, and the slowest
        with gzip.open(folder / f"profile/steps_2-3_rank_{rank:05d}.json.gz") as stream:
            names = {event["name"] for event in json.load(stream)["traceEvents"] if "name" in event}
        assert {"aten::mm", "gloo:all_reduce"} <= names or {"aten::mm", "c10d::allreduce_"} <= names

    done = run_worker(two_ranks, folder)
    assert done.returncode == 0 and "resumed at step 3" in done.stderr, done.stderr
    assert run_forked(two_ranks, alone).returncode == 0
    assert_same_checkpoint(folder, alone)
    assert losses(folder) == losses(alone)
    shutil.rmtree(tmp_path / "alone")


@pytest.mark.distributed
def test_a_rank_that_stands_still_ends_all(two_ranks: Config, tmp_path: Path) -> None:
    two_ranks.launch.timeout_minutes = 0.2
    began = "stopped.txt"
    fault = f"""
    if rank == 1 and run.step == 1:
        open({str(tmp_path / began)!r}, "w").close()
        os.kill(os.getpid(), signal.SIGSTOP)
    """
    done = run_faulty(two_ranks, tmp_path / "run", fault)
    seconds = time.time() - (tmp_path / began).stat().st_mtime
    assert done.returncode == EXIT_CODE, done.stderr
    # And the exit of a Python process, on a machine that others share.
    assert seconds < 60 * two_ranks.launch.timeout_minutes + 5 + 8
    assert "rank 0 on" in done.stderr and "no progress for 0.2 minutes" in done.stderr and "in step 2" in done.stderr
    assert "step_totals" in done.stderr  # where it waits for the other
