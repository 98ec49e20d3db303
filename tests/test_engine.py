"""DeepSpeed's engine takes the steps of plain torch: accumulation, clipping, and infinite gradients skipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moba_train.config import Config, OffloadConfig, OffloadDevice, Precision, TrainConfig
from moba_train.metrics_file import read_rows
from moba_train.parallel.engine import check_disk, engine_config, loading_in_parts
from moba_train.runtime import Runtime
from tiny import run_forked, run_ranks

CASES = {
    "ZeRO 0": (0, "fp32", "none", "none"),
    "ZeRO 1 bf16": (1, "bf16", "none", "none"),
    "ZeRO 2, optimizer on the CPU": (2, "fp32", "cpu", "none"),
    "ZeRO 3": (3, "fp32", "none", "none"),
    "ZeRO 3, all on the CPU": (3, "fp32", "cpu", "cpu"),
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(case, id=name, marks=[pytest.mark.distributed] if case[0] >= 2 else [])
        for name, case in CASES.items()
    ],
)
def facts(request) -> dict:
    printed = run_ranks(Path(__file__).with_name("engine_facts.py"), [*map(str, request.param)])
    return {**json.loads(printed.splitlines()[-1]), "relative": 1e-5 if request.param[1] == "fp32" else 2e-2}


def test_steps_are_those_of_plain_torch(facts: dict) -> None:
    engine, plain = facts["engine"], facts["plain"]
    assert engine["norms"] == pytest.approx(plain["norms"], rel=facts["relative"])
    assert engine["weights"] == pytest.approx(plain["weights"], rel=facts["relative"], abs=facts["relative"] / 10)
    assert engine["training"]


def test_a_step_with_an_infinite_loss_leaves_no_trace(facts: dict) -> None:
    engine, expected = facts["engine"], facts["plain"]["after"]
    assert engine["skipped"] == {"finite": False, "weights": engine["weights"], "moments": True}
    assert engine["after"]["norm"] == pytest.approx(expected["norm"], rel=facts["relative"])
    assert engine["after"]["weights"] == pytest.approx(
        expected["weights"], rel=facts["relative"], abs=facts["relative"] / 10
    )


def test_only_plain_fp32_is_clipped_here() -> None:
    runtime = Runtime(0, 2, 0, torch.device("cpu"))
    assert engine_config(TrainConfig(gradient_clipping=0.7), runtime)["gradient_clipping"] == 0
    sharded = engine_config(TrainConfig(gradient_clipping=0.7, zero_stage=2, precision=Precision.bf16), runtime)
    assert sharded["gradient_clipping"] == 0.7
    assert sharded["zero_optimization"] == {"stage": 2}
    assert sharded["bf16"] == {"enabled": True}


def test_offload_and_types_of_gradients() -> None:
    train = TrainConfig(zero_stage=3, precision=Precision.bf16, gradient_dtype=Precision.bf16)
    train.reduction_dtype = Precision.fp32
    train.offload.optimizer, train.offload.nvme_path = OffloadDevice.nvme, "/disk"
    train.offload.parameters = OffloadDevice.cpu
    config = engine_config(train, Runtime(0, 2, 0, torch.device("cpu")))
    assert config["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/disk"},
        "offload_param": {"device": "cpu"},
    }
    assert config["data_types"] == {"grad_accum_dtype": "bf16"}
    assert config["communication_data_type"] == "fp32"


def test_nvme_needs_a_folder_and_libaio(tmp_path: Path, monkeypatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    offload = OffloadConfig(optimizer=OffloadDevice.nvme, nvme_path=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"train\.offload\.nvme_path=.*none is no folder"):
        check_disk(offload)
    offload.nvme_path = str(tmp_path)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=True: False)
    with pytest.raises(ValueError, match="libaio-dev"):
        check_disk(offload)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=True: True)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
    with pytest.raises(
        ValueError, match=r"TORCH_CUDA_ARCH_LIST=8\.0;9\.0a with .* set it to a number such as 9\.0, or"
    ):
        check_disk(offload)
    for read in ("8.0;9.0+PTX", "8.0 9.0"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", read)
        check_disk(offload)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    check_disk(offload)


def test_a_disk_for_parameters_is_checked_before_they_are_loaded_to_it(tmp_path: Path) -> None:
    offload = OffloadConfig(OffloadDevice.nvme, OffloadDevice.nvme, nvme_path=str(tmp_path / "none"))
    train = TrainConfig(zero_stage=3, offload=offload)
    with (
        pytest.raises(ValueError, match=r"train\.offload\.nvme_path=.*none is no folder"),
        loading_in_parts(train, Runtime(0, 1, 0, torch.device("cpu"))),
    ):
        pass


@pytest.mark.distributed
def test_bf16_with_recomputation_learns(tiny_config: Config, tmp_path: Path) -> None:
    """A whole run in bf16 under ZeRO 1, with activation checkpointing."""
    tiny_config.train.precision, tiny_config.train.zero_stage = Precision.bf16, 1
    tiny_config.train.activation_checkpointing = True
    tiny_config.checkpoint.every_steps = 0
    done = run_forked(tiny_config, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    points = json.loads((tmp_path / "run/result.json").read_text())["points"]
    assert points[0]["trailing_loss"] > points[1]["trailing_loss"] > points[2]["trailing_loss"]
    steps = [row for row in read_rows(tmp_path / "run/metrics.jsonl") if "train/loss" in row]
    assert all(0 < row["train/gradient_norm"] < 100 for row in steps)
