"""Two GPUs over NCCL: what they compute is what one computes, and none goes on without the other. Needs two GPUs."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moba_train.config import Config, Device, LaunchConfig, Precision
from moba_train.parallel import local
from test_distributed import config_of, start, wait_for, workers_of
from test_sequence import Facts, assert_same, case, facts_of, packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.xdist_group("nccl"),  # one process: its tests share what the ranks computed
]

ZERO = [case(f"2 ranks, ZeRO {stage}", 2, stage) for stage in (0, 1, 2, 3)]
SWITCHES = {"activation_checkpointing": True, "keep_attention": True, "mlp_tile_tokens": 100}
FP32 = {
    1: [case(f"{kv_heads} kv heads", 1, 0, kv_heads) for kv_heads in (1, 2)],
    2: [
        *ZERO,
        *(case(f"2 x 1 ranks, ZeRO {stage}", 1, stage) for stage in (1, 3)),
        case("2 ranks, 1 kv head", 2, 0, 1),
        case("2 ranks, switches, ZeRO 3", 2, 3, **SWITCHES),
    ],
}


def fresh_ranks(script: Path, arguments: list[str], ranks: int) -> None:
    """Run a script as every rank, none of them forked: CUDA does not outlive a fork."""
    environments = local.environments(LaunchConfig(gpus=ranks, threads=1), script.parent)
    command = [sys.executable, str(script), *arguments]
    processes = [subprocess.Popen(command, env={**os.environ, **environment}) for environment in environments]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def fp32(tiny_config_module: Config, tiny_corpus: Path, tmp_path_factory) -> Facts:
    folder = tmp_path_factory.mktemp("fp32")
    config = packed(tiny_config_module, tiny_corpus, folder)
    config.launch.device, config.attention.backend = Device.auto, "reference"
    return facts_of(config, folder, FP32, fresh_ranks)


@pytest.mark.parametrize("one", FP32[2], ids=lambda one: one["name"])
def test_two_gpus_give_the_losses_and_gradients_of_one(fp32: Facts, one: dict) -> None:
    assert_same(fp32(2, one["name"]), fp32(1, f"{one['kv_heads']} kv heads"), loss=1e-5, gradients=2e-5)


BF16 = {ranks: [case(f"bf16, {ranks} GPUs", ranks, 2, **SWITCHES)] for ranks in (1, 2)}


def test_two_gpus_give_the_losses_of_one_with_the_kernels(
    tiny_config_module: Config, tiny_corpus: Path, tmp_path_factory
) -> None:
    folder = tmp_path_factory.mktemp("bf16")
    config = packed(tiny_config_module, tiny_corpus, folder)
    config.launch.device, config.attention.backend, config.train.precision = Device.auto, "triton", Precision.bf16
    config.model.architecture["head_dim"] = 64
    facts = facts_of(config, folder, BF16, fresh_ranks)
    assert_same(facts(2, "bf16, 2 GPUs"), facts(1, "bf16, 1 GPUs"), loss=2e-2, gradients=5e-2)


def test_a_killed_rank_ends_the_run(tiny_config_module: Config, tmp_path: Path) -> None:
    config = config_of(tiny_config_module, 2, 0)
    config.launch.processes, config.launch.gpus, config.launch.device = None, 2, Device.auto
    config.attention.backend = "reference"
    config.schedule.stages = copy.deepcopy(config.schedule.stages)
    config.schedule.stages[0].tokens = 10**9
    folder = tmp_path / "run"
    launcher = start(config, folder)
    try:
        wait_for((folder / "checkpoints/step_00000002").exists, 120)
        ranks = [pid for pid in workers_of(folder) if b"LOCAL_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(max(ranks), signal.SIGKILL)
        assert launcher.wait(timeout=90) not in (0, None)
        wait_for(lambda: not workers_of(folder), 10)
    finally:
        print((folder / "log").read_text()[-3000:])
        for pid in workers_of(folder):
            os.kill(pid, signal.SIGKILL)
