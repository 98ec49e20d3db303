"""The built wheel alone, from an empty directory: its recipes, corpus, tokenizer and base model are inside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["schedule.tokens=8192", "train.tokens_per_step=2048", "evaluate.rows=2", "checkpoint.every_steps=0"]


@pytest.fixture(scope="module")
def moba_train(tmp_path_factory):
    """Runs the installed wheel's command line in an empty directory, beside this environment's other packages."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    site, empty = folder / "site", folder / "empty"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    empty.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "WANDB_MODE": "offline"}

    def run(*arguments: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        command = [sys.executable, "-m", "moba_train", *arguments]
        return subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=400), empty

    located = subprocess.run(
        [sys.executable, "-c", "import moba_train; print(moba_train.__file__)"],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert located.stdout.startswith(str(site)), "the editable install was imported in place of the wheel"
    return run


def test_the_default_recipe_runs_and_reports(moba_train) -> None:
    done, folder = moba_train("train", "run.name=short", *SHORT)
    assert done.returncode == 0, done.stderr
    run = folder / "runs/short"
    result = json.loads((run / "result.json").read_text())
    assert [point["point"] for point in result["points"]] == ["start", "moba", "full"]
    assert result["points"][0]["trailing_loss"] > result["trailing_loss"]
    assert "report: " in done.stdout and (run / "report/index.html").stat().st_size > 10_000
    assert (run / "model/model.safetensors").is_file()
    assert list(run.glob("wandb/**/*.wandb")), "W&B keeps the run offline where no key is set"


def test_a_sweep_makes_one_run_a_point_and_compares_them(moba_train) -> None:
    done, folder = moba_train(
        *("train", "--multirun", "attention.block_size=128,256", "attention.top_k=1,2", "wandb.mode=disabled"),
        *("hydra.sweep.dir=runs/sweep", *SHORT, "schedule.tokens=4096", "evaluate.rows=1", "evaluate.at_start=false"),
    )
    assert done.returncode == 0, done.stderr
    runs = sorted(path.name for path in (folder / "runs/sweep").iterdir() if (path / "result.json").is_file())
    assert len(runs) == 4 and runs[0].startswith("0_")
    assert (folder / "runs/sweep/report/heat_map.png").is_file()
    again, _ = moba_train("report", "run=runs/sweep", "out=elsewhere")
    assert again.returncode == 0 and (folder / "elsewhere/index.html").is_file()
