"""Sweeps: where their points live, and that those of another process or machine are counted too."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf

from moba_train import cli
from moba_train.commands import compose, sweep, train
from moba_train.parallel import launch


def point(number: int, name: str | None, *tasks: str) -> str:
    return compose._sweep_point(number, OmegaConf.create(list(tasks)), name)


def test_names_of_points(monkeypatch) -> None:
    tasks = ("run.name=widths", "attention.top_k=4", "experiment=moba_only")
    monkeypatch.setenv("MOBA_TRAIN_SWEPT", "attention.top_k")
    assert point(3, None, *tasks) == "3_attention.top_k=4"
    assert point(3, "widths", *tasks) == "attention.top_k=4"
    monkeypatch.setenv("MOBA_TRAIN_SWEPT", "")
    assert point(3, "widths", *tasks) == "attention.top_k=4,experiment=moba_only"
    again = (*tasks, "run.resume=auto", "launch=slurm", "+launch.environment.A=1", "wandb.mode=offline")
    assert point(0, "widths", *again) == point(3, "widths", *tasks), "what may change between starts names nothing"
    assert point(0, "widths", "run.resume=auto") == "point"


def test_names_that_are_cut_or_rewritten_stay_apart() -> None:
    long = [point(0, "a", f"data.train=[{{path: {'x' * 200}{end}}}]") for end in "12"]
    assert long[0] != long[1] and all(len(name) < 200 for name in long)
    assert point(0, "a", "data.name=x y") != point(0, "a", "data.name=x-y")


def test_notes_of_an_earlier_start_do_not_count(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv(sweep.STARTED, "yesterday")
    sweep.note(tmp_path, 0, 7, None)
    sweep.note(tmp_path, 5, 7, None)
    monkeypatch.setenv(sweep.STARTED, "today")
    sweep.note(tmp_path, 0, 0, None)
    sweep.note(tmp_path, 1, 2, "no such key")
    assert [point.number for point in sweep.read(tmp_path)] == [0, 1]
    assert sweep.exit_code(tmp_path) == 2
    assert not capsys.readouterr().err, "this process has said it"
    monkeypatch.setattr(sweep, "_process", lambda: "another")
    sweep.exit_code(tmp_path)
    assert capsys.readouterr().err == "error: point 1: no such key\n"


def test_a_named_sweep_is_found_again(tiny_overrides: list[str], tmp_path: Path, monkeypatch) -> None:
    started: list[Path] = []
    monkeypatch.setattr(launch, "run", lambda config, file, claim: started.append(file.parent) or 7)
    command = ["train", "--multirun", *tiny_overrides, "run.name=widths"]
    assert cli.run([*command, "attention.top_k=2,3"]) == 7
    assert cli.run([*command, "run.resume=auto", "attention.top_k=1,2,3"]) == 7
    first, second = started[:2], started[2:]
    assert [folder.parent for folder in started] == [tmp_path / "runs/widths"] * 5
    assert len(set(first)) == 2 and set(first) < set(second)
    assert {folder.name for folder in second} == {f"attention.top_k={k}" for k in (1, 2, 3)}


@pytest.mark.parametrize(
    ("code", "trailing_loss", "objective"),
    [(0, 2.5, 2.5), (7, 2.5, math.inf), (0, None, math.inf), (0, "no result yet", None)],
    ids=["completed", "failed", "its rows are gone", "a batch job to come"],
)
def test_what_a_sweeper_is_told(code, trailing_loss, objective, tmp_path: Path, monkeypatch) -> None:
    """A number wherever there is one to come to: Optuna ends a sweep at a point without."""
    if trailing_loss != "no result yet":
        (tmp_path / "result.json").write_text(
            json.dumps({"status": "completed", "points": [], "trailing_loss": trailing_loss})
        )
    monkeypatch.setattr(train, "run_one", lambda config: (tmp_path, code))
    monkeypatch.setattr(train.resolved, "to_config", lambda composed: composed)
    monkeypatch.setattr(train.HydraConfig, "get", lambda: SimpleNamespace(mode=RunMode.RUN))
    assert train.point([], OmegaConf.create()) == objective


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_whole_sweep(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch, capsys, number: int
) -> None:
    started: list[Path] = []
    monkeypatch.setattr(launch, "run", lambda config, file, claim: started.append(file.parent) or 128 + number)
    with pytest.raises(SystemExit) as end:
        cli.run(["train", "--multirun", *tiny_overrides, "run.name=widths", "attention.top_k=2,3"])
    assert end.value.code == 128 + number
    assert started == [tmp_path / "runs/widths/attention.top_k=2"]
    assert f"error: the sweep in {tmp_path / 'runs/widths'} ends here" in capsys.readouterr().err


@pytest.mark.parametrize("swept", ["attention.top_k=glob(*)", "experiment=glob(none*)"])
def test_a_sweep_without_points_is_refused(tiny_overrides: list[str], capsys, swept: str) -> None:
    """Hydra runs nothing and says nothing."""
    assert cli.run(["train", "--multirun", *tiny_overrides, swept]) == 2
    assert capsys.readouterr().err.startswith("error: the sweep has no point: glob(…) chooses among the files of a")


def test_a_directory_of_hydras_own(tiny_overrides: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(launch, "run", lambda config, file, claim: config.port and 7)
    folder = tmp_path / "elsewhere"
    assert cli.run(["train", "-m", *tiny_overrides, f"hydra.sweep.dir={folder}", "attention.top_k=2,3"]) == 7
    assert sorted(path.name for path in folder.glob("*/resolved.yaml")) == ["resolved.yaml"] * 2


@pytest.mark.distributed
def test_points_of_another_process(tiny_overrides: list[str], tmp_path: Path) -> None:
    """Submitit's local executor: each point is pickled and unpickled in a process of its own, as a batch job's is."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = [sys.executable, "-m", "moba_train", "train", "--multirun", *tiny_overrides]
    done = subprocess.run(
        [*command, "hydra/launcher=submitit_local", "run.name=widths", "attention.top_k=0,2"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2, done.stderr
    assert "error: point 0: attention.top_k=0: must be at least 1" in done.stderr and "Traceback" not in done.stderr
    (result,) = (tmp_path / "runs/widths").glob("*/result.json")
    assert result.parent.name == "attention.top_k=2"
    assert json.loads(result.read_text())["status"] == "completed"
