"""The command lines of the big recipe, as far as they go without its machines: the settings, and the exact command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moba_train import cli, resolved

RECIPE = ["train", "experiment=llama3_8b_1m", "launch.dry_run=true"]


@pytest.mark.parametrize(
    ("settings", "size", "lines"),
    [
        (["launch=local", "launch.gpus=8"], 8, ["for rank in 0 1 2 3 4 5 6 7; do RANK=$rank"]),
        (["launch=hostfile", "launch.hostfile=hosts"], 16, ["ssh ", "ssh "]),
        (["launch=slurm", "launch.nodes=4", "launch.gpus_per_node=8"], 32, ["sbatch --parsable "]),
    ],
    ids=["local", "hostfile", "slurm"],
)
def test_launches(
    settings: list[str], size: int, lines: list[str], tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hosts").write_text("node1 slots=8\nnode2 slots=8\n")
    assert cli.run([*RECIPE, *settings, "run.name=first"]) == 0
    printed = capfd.readouterr().out.splitlines()
    assert len(printed) == len(lines)
    assert all(line.startswith(f"command: {start}") for line, start in zip(printed, lines, strict=True)), printed
    launch = resolved.load(tmp_path / "runs/first/resolved.yaml").launch
    assert launch.world_size == size and launch.needs_gpus
    assert not torch.cuda.is_initialized()


def test_a_dry_run_may_follow_a_dry_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for nodes in (1, 2):
        assert cli.run([*RECIPE, "launch=slurm", f"launch.nodes={nodes}", "run.name=first"]) == 0
    assert f"#SBATCH --nodes={nodes}" in (tmp_path / "runs/first/launch.sbatch").read_text()
