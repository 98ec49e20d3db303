"""A batch job: the script that is written, and that it runs, saves near the time limit, and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moba_train.config import Device, LaunchConfig, LaunchKind
from moba_train.metrics_file import read_rows
from moba_train.parallel import launch, slurm


def slurm_launch(**settings) -> LaunchConfig:
    return LaunchConfig(kind=LaunchKind.slurm, **settings)


def test_the_script(tmp_path: Path) -> None:
    config = launch.settle(slurm_launch(nodes=4, gpus_per_node=8))
    config.slurm.partition, config.slurm.time, config.slurm.options = "gpu", "24:00:00", {"exclusive": ""}
    config.slurm.setup = ["module load cuda"]
    folder = tmp_path / "it's mine"
    text = slurm.script(config, folder / "resolved.yaml")
    lines = text.splitlines()
    head = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert {"nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "partition=gpu", "time=24:00:00", "exclusive"} <= set(
        head
    )
    assert {"requeue", "signal=USR1@300", "open-mode=append"} <= set(head)
    assert lines.index("module load cuda") < next(i for i, line in enumerate(lines) if line.startswith("srun"))
    assert any(line.startswith("export TORCH_NCCL_ASYNC_ERROR_HANDLING=") for line in lines)
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0

    config.slurm.save_seconds, config.slurm.options = 0, {"nodes": "5"}
    config.device, config.gpus_per_node, config.processes = Device.cpu, None, 8
    text = slurm.script(config, folder / "resolved.yaml")
    assert "--nodes=5" in text and "--nodes=4" not in text, "the user's own options count"
    assert "--ntasks-per-node=2" in text and "--gpus" not in text and "--signal" not in text
    assert "\nMASTER_ADDR=$(scontrol" in text
    config.environment = {"MASTER_ADDR": "node1-ib"}
    text = slurm.script(config, folder / "resolved.yaml")
    assert "export MASTER_ADDR=node1-ib" in text and "scontrol show" not in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"nodes": 4}, "launch.gpus_per_node"),
        ({"nodes": 2, "processes": 3}, "launch.processes=3 .* launch.nodes=2"),
        ({"gpus_per_node": 8, "gpus": 9}, "launch.gpus=9 .* launch.gpus_per_node=8"),
    ],
)
def test_numbers_that_do_not_fit(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        launch.settle(slurm_launch(**settings))


def test_options_that_are_none() -> None:
    for options in ({"--time": "1"}, {"time": "1\nrm"}):
        config = slurm_launch(gpus_per_node=1)
        config.slurm.options = options
        with pytest.raises(ValueError, match=r"launch\.slurm\.options\..*without --"):
            launch.settle(config)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        *(("90", 5400), ("90:30", 5430), ("24:00:00", 86400), ("2-12", 216000), ("2-12:30", 217800)),
        *(("1-0:0:5", 86405), ("UNLIMITED", None), ("0", None), ("", None), (None, None)),
    ],
)
def test_time_limits_as_sbatch_reads_them(limit: str | None, expected: int | None) -> None:
    assert slurm.seconds(limit) == expected


def test_a_limit_that_leaves_no_time() -> None:
    config = slurm_launch(gpus_per_node=1)
    config.slurm.time = "6"
    with pytest.raises(ValueError, match=r"launch\.slurm\.time=6 .*launch\.slurm\.save_seconds=300"):
        launch.settle(config)
    config.slurm.save_seconds = 299
    launch.settle(config)


def test_no_cluster(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=r"needs sbatch, .* launch\.dry_run=true"):
        launch.check(slurm_launch(gpus_per_node=1))


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch) -> None:
    for name in ("sbatch", "srun", "scontrol"):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!{sys.executable}\n" + Path(__file__).with_name("fake_slurm.py").read_text())
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")


def test_a_job_that_is_refused(cluster, tmp_path: Path, capfd) -> None:
    config = launch.settle(slurm_launch(gpus_per_node=8))
    config.slurm.partition, config.slurm.wait = "nowhere", True
    launch.check(config)
    assert launch.run(config, tmp_path / "resolved.yaml") == 1
    printed = capfd.readouterr()
    assert "invalid partition" in printed.err and "scancel" not in printed.out
    config.dry_run = True
    assert launch.run(config, tmp_path / "resolved.yaml") == 0
    assert capfd.readouterr().out == f"command: sbatch --parsable --wait {tmp_path}/launch.sbatch\n"


@pytest.mark.distributed
def test_a_job_near_its_limit_goes_on(cluster, tiny_overrides: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "runs/job"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "moba_train", "train", *tiny_overrides, "run.name=job"),
            *("launch=slurm", "launch.nodes=2", "launch.processes=2", "launch.slurm.wait=true"),
            *("launch.slurm.time=24:00:00", "schedule.stages.0.tokens=12288"),
            "launch.slurm.setup=[set -euo pipefail]",
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )
    log = (folder / "slurm-77.log").read_text()
    assert done.returncode == 0, done.stderr + log
    assert "job 77: its log is" in done.stdout
    assert "#SBATCH --time=24:00:00" in (folder / "launch.sbatch").read_text()
    assert "stopped by SIGUSR1 at step" in log and (folder / "was_queued_again").exists()
    assert "resumed at step" in log
    steps = [row["step"] for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row]
    assert steps == list(range(1, 25))
    assert json.loads((folder / "result.json").read_text())["status"] == "completed"
    assert (folder / "report").is_dir()
