"""Optimizer state on a disk goes on from a checkpoint. Needs libaio and a compiler; DeepSpeed compiles for a minute."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch

from moba_train.config import Config, OffloadDevice
from moba_train.data.tokens import prepare_store
from moba_train.metrics_file import read_rows
from moba_train.parallel.engine import check_disk
from tiny import run_worker

pytestmark = pytest.mark.distributed


@pytest.fixture
def on_disk(tiny_config: Config, tmp_path: Path) -> Config:
    tiny_config.train.zero_stage = 3
    offload = tiny_config.train.offload
    offload.optimizer, offload.nvme_path = OffloadDevice.nvme, str(tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    try:
        check_disk(offload)
    except ValueError as reason:
        pytest.skip(str(reason))
    tiny_config.model.architecture |= {"hidden_size": 1024, "intermediate_size": 128, "num_hidden_layers": 1}
    tiny_config.checkpoint.export = False
    prepare_store(tiny_config.data, str(tiny_config.model.tokenizer), progress=False)
    return tiny_config


def rows(config: Config, folder: Path) -> dict[int, tuple[float, float]]:
    done = run_worker(config, folder)
    assert done.returncode == 0, done.stderr
    found = read_rows(folder / "metrics.jsonl")
    return {row["step"]: (row["train/loss"], row["train/gradient_norm"]) for row in found if "train/loss" in row}


def test_a_run_goes_on_with_the_moments_of_its_files(on_disk: Config, tmp_path: Path) -> None:
    whole = rows(on_disk, tmp_path / "whole")
    for name in ("checkpoints/step_00000004", "metrics.jsonl"):
        copy_ = shutil.copytree if "step" in name else shutil.copy
        (tmp_path / "again" / name).parent.mkdir(parents=True, exist_ok=True)
        copy_(tmp_path / "whole" / name, tmp_path / "again" / name)
    shutil.rmtree(tmp_path / "disk")  # as on another machine
    (tmp_path / "disk").mkdir()
    assert rows(on_disk, tmp_path / "again") == whole
    in_memory = copy.deepcopy(on_disk)
    in_memory.train.offload.optimizer, in_memory.train.offload.nvme_path = OffloadDevice.none, None
    expected = torch.tensor(list(rows(in_memory, tmp_path / "memory").values()))
    torch.testing.assert_close(torch.tensor(list(whole.values())), expected, rtol=1e-5, atol=0.0)


def test_state_that_would_be_lost_is_refused(on_disk: Config, tmp_path: Path) -> None:
    on_disk.model.architecture |= {"hidden_size": 32}
    done = run_worker(on_disk, tmp_path / "small")
    assert done.returncode == 2 and "which DeepSpeed would leave out of its checkpoints" in done.stderr
