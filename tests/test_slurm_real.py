"""A batch job under a real SLURM, where one is installed (``slurm_cluster``): told to save, queued again, failing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import slurm_cluster
from moba_train.metrics_file import read_rows

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not slurm_cluster.installed(), reason="needs SLURM: apt-get install slurmctld slurmd munge"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    with slurm_cluster.cluster() as environment:
        yield environment


def submit(environment: dict[str, str], overrides: list[str], name: str, steps: int) -> str:
    """The job's number. The names of its nodes resolve nowhere, so rank 0's address is given."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "moba_train", "train", *overrides, f"run.name={name}"),
            *("launch=slurm", "launch.nodes=2", "launch.processes=2", "+launch.environment.MASTER_ADDR=127.0.0.1"),
            "+launch.slurm.options.cpus-per-task=2",
            *(f"schedule.stages.0.tokens={512 * steps}", "checkpoint.every_steps=1000"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return re.findall(r"^job (\d+): its log is", done.stdout, re.MULTILINE)[0]


def until(ready: Callable[[], object], folder: Path) -> None:
    limit = time.monotonic() + 60
    while not ready():
        logs = "".join(file.read_text() for file in folder.glob("slurm-*.log"))
        assert time.monotonic() < limit, logs
        time.sleep(0.2)


def steps_of(folder: Path) -> list[int]:
    file = folder / "metrics.jsonl"
    return [row["step"] for row in read_rows(file) if "train/loss" in row] if file.exists() else []


def facts(environment: dict[str, str], job: str) -> dict[str, str]:
    told = subprocess.run(["scontrol", "show", "job", "-o", job], env=environment, capture_output=True, text=True)
    return dict(re.findall(r"(\w+)=(\S+)", told.stdout))


def test_a_job_that_is_told_to_save_goes_on(cluster, tiny_overrides: list[str], tmp_path: Path) -> None:
    """SIGUSR1, as near the time limit; the directory's name has a space."""
    folder = tmp_path / "my runs/job"
    job = submit(cluster, [*tiny_overrides, f"run.dir='{folder.parent}'"], "job", 200)
    until(lambda: steps_of(folder), folder)
    subprocess.run(["scancel", "--signal=USR1", job], env=cluster, check=True)
    until(lambda: facts(cluster, job)["JobState"] == "COMPLETED", folder)
    log = (folder / f"slurm-{job}.log").read_text()
    saved = int(re.findall(r"stopped by SIGUSR1 at step (\d+)", log)[0])
    assert f"resumed at step {saved} of 200" in log and facts(cluster, job)["Restarts"] == "1"
    assert steps_of(folder) == list(range(1, 201))
    assert json.loads((folder / "result.json").read_text())["status"] == "completed" and (folder / "report").is_dir()


def test_a_killed_rank_ends_the_job(cluster, tiny_overrides: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "runs/killed"
    job = submit(cluster, tiny_overrides, "killed", 100000)
    until(lambda: steps_of(folder), folder)
    os.kill(ranks(folder)[-1], signal.SIGKILL)
    until(lambda: facts(cluster, job)["JobState"] == "FAILED", folder)
    assert facts(cluster, job)["ExitCode"] == "137:0" and facts(cluster, job)["Restarts"] == "0"
    assert not ranks(folder)


def ranks(folder: Path) -> list[int]:
    """Processes of a run's workers."""
    pattern = f"^[^ ]*python.* -m moba_train.worker --config {folder}/resolved.yaml$"
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True)
    return [int(number) for number in found.stdout.split()]
