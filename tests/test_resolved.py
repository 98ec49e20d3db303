"""Configuration → resolved.yaml → configuration."""

from __future__ import annotations

import operator
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from moba_train import preflight, resolved, worker
from moba_train.config import (
    AttentionKind,
    Config,
    FusedKernels,
    OffloadDevice,
    Precision,
    Resume,
    RopeConfig,
    StageLearningRateConfig,
    WandbMode,
)


@pytest.fixture
def rich(tiny_config: Config) -> Config:
    """A configuration with every kind of value away from its default."""
    tiny_config.run.resume = Resume.auto
    tiny_config.train.precision, tiny_config.train.zero_stage = Precision.bf16, 1
    tiny_config.optimizer.eps = 1e-9
    tiny_config.schedule.stages[1].rope = RopeConfig("yarn", 5e5, 4.0, 64, {"beta_fast": 32.0})
    tiny_config.schedule.stages[1].learning_rate = StageLearningRateConfig(0.5, 0.0)
    tiny_config.wandb.tags = ["on", "1e3", "null", "a: b # c"]  # what YAML could take for something else
    tiny_config.data.train[0].path = "/books/été — 1.txt"
    return tiny_config


def test_round_trip(rich: Config, tmp_path: Path) -> None:
    file = tmp_path / resolved.FILE
    file.write_text(resolved.to_yaml(rich))
    assert resolved.load(file) == rich


def test_defaults_round_trip(tmp_path: Path) -> None:
    file = tmp_path / resolved.FILE
    file.write_text(resolved.to_yaml(Config()))
    assert resolved.load(file) == Config()


def test_secrets_are_not_written(tiny_config: Config, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    assert resolved.secrets(tiny_config) == []
    tiny_config.launch.slurm.setup = ["export SEED=1 HF_TOKEN=$MINE", "TOKENIZERS_PARALLELISM=false"]
    assert resolved.secrets(tiny_config) == []
    tiny_config.launch.slurm.setup.append("export A=1 HF_TOKEN=swordfish")
    assert resolved.secrets(tiny_config) == ["launch.slurm.setup.2"] and "swordfish" not in resolved.to_yaml(
        tiny_config
    )
    tiny_config.launch.slurm.setup.clear()
    tiny_config.wandb.tags = ["key 0123456789abcdef"]
    tiny_config.model.architecture["auth_token"] = "hunter2"
    text = resolved.to_yaml(tiny_config)
    assert "0123456789abcdef" not in text and "hunter2" not in text
    assert resolved.secrets(tiny_config) == ["model.architecture.auth_token", "wandb.tags.0"]
    with pytest.raises(ValueError, match=r"model\.architecture\.auth_token holds a secret"):
        preflight.open_folder(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


SETTINGS = [
    ("attention.block_size=x", "attention.block_size"),
    ("attention.kind=mobba", "attention.kind"),
    ("attention.blok_size=1", "attention.blok_size"),
    ("schedule.learning_rate.peak=high", "schedule.learning_rate.peak"),
    ("schedule.stages=[{name: a}, {context_length: long}]", "schedule.stages[1]: context_length"),
    ("schedule.stages=[{name: a}, {}, {attention: {topk: 1}}]", "schedule.stages[2]: attention.topk"),
]


@pytest.mark.parametrize(("setting", "named"), SETTINGS, ids=[setting for setting, _ in SETTINGS])
def test_faults_name_their_place_in_one_line(setting: str, named: str) -> None:
    key, _, value = setting.partition("=")
    composed = OmegaConf.create({})
    OmegaConf.update(composed, key, OmegaConf.create(value) if value.startswith("[") else value)
    with pytest.raises(ValueError, match=re.escape(named)) as caught:
        resolved.to_config(composed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "- a\n", "a: [\n", "run: {nme: x}\n", "\x00"], ids=repr)
def test_a_damaged_file_is_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / resolved.FILE
    file.write_text(content)
    with pytest.raises(ValueError) as caught:
        resolved.load(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_what_may_differ_in_a_continued_run(rich: Config, tmp_path: Path) -> None:
    file = tmp_path / resolved.FILE
    file.write_text(resolved.to_yaml(rich))
    other = resolved.load(file)
    other.run.resume, other.run.label, other.run.dir, other.run.name = Resume.must, "again", "/elsewhere", "moved"
    other.wandb.mode, other.wandb.project = WandbMode.online, "elsewhere"
    other.launch.processes, other.launch.threads = 2, 4
    other.checkpoint.every_steps, other.checkpoint.keep = 7, 9
    other.train.log_every = other.position_loss.log_every = 3
    other.data.store_dir, other.data.threads = "/store", 8
    assert resolved.differences(rich, other) == []


MEMORY: dict[str, Any] = {
    "train.micro_batch_tokens": 256,
    "train.zero_stage": 3,
    "train.sequence_parallel_size": 2,
    "train.activation_checkpointing": True,
    "train.keep_attention": False,
    "train.keep_choices": False,
    "train.mlp_tile_tokens": 64,
    "train.loss_tile_tokens": 64,
    "train.offload.optimizer": OffloadDevice.cpu,
    "train.offload.hidden_states": True,
    "train.offload.moments": True,
    "train.gradient_dtype": Precision.bf16,
    "train.reduction_dtype": Precision.bf16,
    "train.fused_kernels": FusedKernels.none,
    "attention.backend": "varlen",
}


def test_a_run_that_lacked_memory_may_go_on_as_its_last_words_advise(rich: Config, tmp_path: Path) -> None:
    rich.train.micro_batch_tokens, rich.train.keep_attention, rich.launch.processes = 512, True, 4
    file = tmp_path / resolved.FILE
    file.write_text(resolved.to_yaml(rich))
    advised = re.findall(r"train\.[a-z_.]+", worker._out_of_memory(torch.OutOfMemoryError("no memory"), rich))
    assert {"train.mlp_tile_tokens", "train.keep_attention", "train.offload.moments"} <= set(advised)
    for key in {*advised, *MEMORY}:
        other = resolved.load(file)
        *path, last = key.split(".")
        setattr(operator.attrgetter(".".join(path))(other), last, MEMORY[key])
        assert other != rich and resolved.differences(rich, other) == [], key


def test_what_may_not_differ(rich: Config, tmp_path: Path) -> None:
    file = tmp_path / resolved.FILE
    file.write_text(resolved.to_yaml(rich))
    other = resolved.load(file)
    other.run.seed = 1
    other.attention.top_k = 3
    other.attention.kind = AttentionKind.full
    other.schedule.stages[0].tokens = 4096
    other.schedule.stages[1].rope = RopeConfig()
    other.model.architecture["hidden_size"] = 64
    other.data.train.pop()
    named = [line.partition(":")[0] for line in resolved.differences(rich, other)]
    assert {"run.seed", "attention.top_k", "schedule.stages.0.tokens", "model.architecture.hidden_size"} <= set(named)
    assert any(name.startswith("schedule.stages.1.rope") for name in named)
    assert any(name.startswith("data.train") for name in named)
    assert {"attention.top_k: 2 -> 3", "attention.kind: moba -> full"} <= set(resolved.differences(rich, other))
