"""What saves memory changes no number beyond rounding, alone or together, and a run resumes with it bit by bit."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path

import pytest
import torch

from moba_train.config import Config, OffloadConfig, OffloadDevice
from moba_train.metrics_file import read_rows
from tiny import checkpoint_tensors, run_forked

pytestmark = pytest.mark.distributed  # for their length: each is a run of its own

RECOMPUTED = {"activation_checkpointing": True, "keep_attention": True, "mlp_tile_tokens": 100}
CASES = {
    "recomputed, moments on the host": {**RECOMPUTED, "offload": OffloadConfig(moments=True, hidden_states=True)},
    "ZeRO 2, optimizer on the CPU": {"zero_stage": 2, "offload": OffloadConfig(optimizer=OffloadDevice.cpu)},
    "ZeRO 3, everything": {
        **RECOMPUTED,
        "zero_stage": 3,
        "offload": OffloadConfig(OffloadDevice.cpu, OffloadDevice.cpu, hidden_states=True),
    },
}


def with_switches(base: Config, switches: dict) -> Config:
    config = copy.deepcopy(base)
    for name, value in switches.items():
        setattr(config.train, name, value)
    return config


def run(config: Config, folder: Path) -> Path:
    done = run_forked(config, folder)
    assert done.returncode == 0, done.stderr
    return folder


def losses(folder: Path) -> list[dict[str, float]]:
    kept = re.compile(r"(train|eval)/(loss|trailing_loss|gradient_norm)|step")
    return [
        {key: value for key, value in row.items() if kept.fullmatch(key)} for row in read_rows(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def plain(tiny_config_module: Config, tmp_path_factory) -> list[dict[str, float]]:
    return losses(run(tiny_config_module, tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize("name", CASES)
def test_switches_change_no_number(name: str, plain: list, tiny_config_module: Config, tmp_path: Path) -> None:
    config = with_switches(tiny_config_module, CASES[name])
    folder = run(config, tmp_path / "whole")
    for got, expected in zip(losses(folder), plain, strict=True):
        assert got == pytest.approx(expected, rel=2e-6)
    if "on the CPU" in name:
        return
    resumed = tmp_path / "resumed"
    shutil.copytree(folder / "checkpoints/step_00000004", resumed / "checkpoints/step_00000004")
    shutil.copy(folder / "metrics.jsonl", resumed)
    run(config, resumed)
    assert losses(resumed) == losses(folder)
    whole, again = (checkpoint_tensors(path / "checkpoints/step_00000006") for path in (folder, resumed))
    assert whole.keys() == again.keys() and any("exp_avg" in key for key in whole)
    assert all(torch.equal(again[key], whole[key]) for key in whole)
