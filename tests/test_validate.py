"""Ranges, and values that do not go together: each message names the key and its value."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from moba_train.config import (
    Config,
    FusedKernels,
    LaunchKind,
    OffloadDevice,
    Precision,
    Resume,
    StageLearningRateConfig,
)
from moba_train.validate import check_slices, micro_batch_rows, validate


def change(config: Config, key: str, value: Any) -> None:
    """Set a dotted key; numbers index lists."""
    target: Any = config
    *path, last = key.split(".")
    for name in path:
        target = target[int(name)] if name.isdigit() else getattr(target, name)
    setattr(target, last, value)


def test_the_tiny_run_is_valid(tiny_config: Config) -> None:
    validate(tiny_config)


OUT_OF_RANGE = [
    ("attention.block_size", 0),
    ("attention.top_k", 0),
    ("attention.full_layers", -1),
    ("attention.key_conv", 4),
    ("run.seed", -1),
    ("run.seed", 2**63),
    ("train.tokens_per_step", 0),
    ("train.micro_batch_tokens", 0),
    ("train.loss_tile_tokens", 0),
    ("train.sequence_parallel_size", 0),
    ("train.mlp_tile_tokens", -1),
    ("train.log_every", 0),
    ("train.nonfinite_limit", 0),
    ("train.gradient_clipping", math.nan),
    ("train.zero_stage", 4),
    ("train.profile_steps", [10]),
    ("train.profile_steps", [12, 10]),
    ("train.profile_steps", [0, 1]),
    ("position_loss.bin_size", 0),
    ("position_loss.log_every", 0),
    ("evaluate.rows", 0),
    ("evaluate.every_steps", -1),
    ("checkpoint.every_steps", -1),
    ("checkpoint.keep", 0),
    ("launch.processes", 0),
    ("launch.threads", -1),
    ("launch.port", 65536),
    ("launch.slurm.save_seconds", -1),
    ("data.threads", -1),
    ("data.heldout_fraction", 1.5),
    ("data.min_document_tokens", 0),
    ("optimizer.weight_decay", math.inf),
    ("optimizer.beta1", 1.0),
    ("optimizer.beta2", -0.1),
    ("optimizer.eps", 0.0),
    ("schedule.learning_rate.peak", math.inf),
    ("schedule.learning_rate.warmup_share", -0.1),
    ("schedule.learning_rate.final_ratio", math.nan),
]


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE, ids=lambda value: str(value))
def test_out_of_range(tiny_config: Config, key: str, value: Any) -> None:
    change(tiny_config, key, value)
    with pytest.raises(ValueError, match=re.escape(f"{key}={value}")):
        validate(tiny_config)


ENDS_OF_RANGES = [
    *((key, 0) for key in ("attention.full_layers", "run.seed", "train.gradient_clipping", "evaluate.every_steps")),
    *((key, 0) for key in ("checkpoint.every_steps", "launch.threads", "launch.port", "data.threads")),
    *((key, 1) for key in ("attention.block_size", "attention.top_k", "train.loss_tile_tokens", "train.log_every")),
    *((key, 1) for key in ("train.nonfinite_limit", "position_loss.bin_size", "position_loss.log_every")),
    *((key, 1) for key in ("evaluate.rows", "checkpoint.keep", "launch.processes", "data.min_document_tokens")),
    ("run.seed", 2**63 - 1),
    ("launch.port", 65535),
    ("attention.key_conv", 5),
    ("train.profile_steps", [1, 1]),
    ("optimizer.beta2", 0.0),
]


@pytest.mark.parametrize(("key", "value"), ENDS_OF_RANGES, ids=lambda value: str(value))
def test_the_ends_of_a_range_belong_to_it(tiny_config: Config, key: str, value: Any) -> None:
    change(tiny_config, key, value)
    validate(tiny_config)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "works"), [(12, 4, "1, 2, 4, 12"), (8, 2, "1, 2, 4, 8"), (9, 3, "1, 3, 9")]
)
def test_heads_share_out_over_sequence_parallel_ranks(
    tiny_config: Config, heads: int, kv_heads: int, works: str
) -> None:
    for size in range(1, heads + 2):
        tiny_config.train.sequence_parallel_size = size
        if str(size) in works.split(", "):
            check_slices(tiny_config, heads, kv_heads)
        else:
            with pytest.raises(ValueError, match=f"size={size} does not .*: set it to one of {works}$"):
                check_slices(tiny_config, heads, kv_heads)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a b", "x" * 121])
@pytest.mark.parametrize("key", ["run.name", "run.label", "data.name", "schedule.stages.0.name"])
def test_names_that_are_no_folder_names(tiny_config: Config, key: str, name: str) -> None:
    change(tiny_config, key, name)
    with pytest.raises(ValueError, match=re.escape(key.replace(".0.", "[0]."))):
        validate(tiny_config)


def test_a_stage_is_not_named_like_an_evaluation(tiny_config: Config) -> None:
    tiny_config.schedule.stages[1].name = "start"
    with pytest.raises(ValueError, match=re.escape("schedule.stages[1].name=start")):
        validate(tiny_config)


def test_a_stage_learning_rate_is_not_negative(tiny_config: Config) -> None:
    tiny_config.schedule.stages[1].learning_rate = StageLearningRateConfig(start=1.0, end=-0.5)
    with pytest.raises(ValueError, match=re.escape("schedule.stages[1].learning_rate.end=-0.5")):
        validate(tiny_config)


def test_warmup_and_decay_fit_in_the_run(tiny_config: Config) -> None:
    tiny_config.schedule.learning_rate.warmup_share = 0.8
    with pytest.raises(ValueError, match=r"warmup_share=0\.8 and decay_share=0\.3"):
        validate(tiny_config)


def test_bf16_needs_fp32_state(tiny_config: Config) -> None:
    tiny_config.train.precision = Precision.bf16
    with pytest.raises(ValueError, match=r"train\.zero_stage=1"):
        validate(tiny_config)
    tiny_config.train.zero_stage = 1
    validate(tiny_config)


def test_offload_rests_on_zero(tiny_config: Config) -> None:
    train = tiny_config.train
    train.offload.optimizer = OffloadDevice.cpu
    with pytest.raises(ValueError, match=r"train\.offload\.optimizer=cpu with train\.zero_stage=0: set .*zero_stage=1"):
        validate(tiny_config)
    train.zero_stage = 1
    validate(tiny_config)
    train.offload.parameters = OffloadDevice.cpu
    with pytest.raises(ValueError, match=r"train\.offload\.parameters=cpu with .*zero_stage=1: set .*zero_stage=3"):
        validate(tiny_config)
    train.zero_stage = 3
    validate(tiny_config)
    train.offload.parameters = OffloadDevice.nvme
    with pytest.raises(ValueError, match=r"parameters=nvme needs train\.offload\.nvme_path"):
        validate(tiny_config)
    train.offload.nvme_path = "/disk"
    validate(tiny_config)
    train.offload.moments = True
    with pytest.raises(ValueError, match=r"moments=true with train\.offload\.optimizer=cpu, which moves them too"):
        validate(tiny_config)
    train.offload.moments = False
    train.offload.parameters = OffloadDevice.none
    with pytest.raises(ValueError, match=r"train\.offload\.nvme_path=/disk is not used"):
        validate(tiny_config)


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.keep_attention", True), ("train.offload.hidden_states", True), ("train.keep_choices", False)],
)
def test_what_belongs_to_activation_checkpointing(tiny_config: Config, key: str, value: bool) -> None:
    change(tiny_config, key, value)
    with pytest.raises(ValueError, match=rf"{key}={str(value).lower()} needs train\.activation_checkpointing=true"):
        validate(tiny_config)
    tiny_config.train.activation_checkpointing = True
    validate(tiny_config)


def test_gradients_are_not_kept_below_the_model(tiny_config: Config) -> None:
    tiny_config.train.gradient_dtype = Precision.bf16
    with pytest.raises(ValueError, match=r"gradient_dtype=bf16 with train\.precision=fp32"):
        validate(tiny_config)


def test_fused_kernels_need_a_gpu(tiny_config: Config) -> None:
    tiny_config.train.fused_kernels = FusedKernels.liger
    with pytest.raises(ValueError, match=r"fused_kernels=liger with launch\.device=cpu"):
        validate(tiny_config)


def test_sources(tiny_config: Config) -> None:
    tiny_config.data.heldout[0].path = ""
    with pytest.raises(ValueError, match=re.escape("data.heldout[0].path is empty")):
        validate(tiny_config)
    tiny_config.data.heldout = []
    with pytest.raises(ValueError, match=r"data\.heldout_fraction"):
        validate(tiny_config)
    tiny_config.data.heldout_fraction = 0.1
    validate(tiny_config)
    tiny_config.data.train = []
    with pytest.raises(ValueError, match=r"data\.train is empty"):
        validate(tiny_config)


def test_rows_share_out_over_ranks_and_micro_batches(tiny_config: Config) -> None:
    """A step is 512 tokens: 4 rows of the first stage and 2 of the second."""
    tiny_config.launch.processes = 4
    with pytest.raises(ValueError, match=re.escape("schedule.stages[1]: 2 rows of 256 tokens")):
        validate(tiny_config)
    tiny_config.launch.processes = 2
    validate(tiny_config)
    tiny_config.train.micro_batch_tokens = 512
    with pytest.raises(ValueError, match="a multiple of 1024"):
        validate(tiny_config)
    tiny_config.train.tokens_per_step = 1024
    validate(tiny_config)
    assert [micro_batch_rows(tiny_config, context) for context in (128, 256, 1024)] == [4, 2, 1]


def test_sequence_parallel_groups_share_out_ranks_rows_and_steps(tiny_config: Config) -> None:
    tiny_config.launch.processes, tiny_config.train.sequence_parallel_size = 8, 2
    with pytest.raises(ValueError, match=r"\(launch\.processes=8\) / train\.sequence_parallel_size=2 x 1 row"):
        validate(tiny_config)
    tiny_config.train.sequence_parallel_size = 4  # two groups for the two rows of a step
    validate(tiny_config)
    tiny_config.train.sequence_parallel_size = 3
    with pytest.raises(ValueError, match=r"size=3 does not divide the ranks of launch\.processes=8: .* multiple of 3"):
        validate(tiny_config)
    tiny_config.launch.processes = 3
    with pytest.raises(ValueError, match=r"stages\[0\]\.context_length=128 .*size=3 .* multiple of 3"):
        validate(tiny_config)


def test_resuming_needs_a_name(tiny_config: Config) -> None:
    tiny_config.run.name, tiny_config.launch.kind = None, LaunchKind.environment
    with pytest.raises(ValueError, match=r"launch=environment needs run\.name"):
        validate(tiny_config)
    tiny_config.run.name, tiny_config.run.resume = None, Resume.auto
    with pytest.raises(ValueError, match=r"run.resume=auto needs run.name"):
        validate(tiny_config)
