"""Which parameters decay, and the learning rate that the schedule sets."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from moba_train.config import OptimizerConfig
from moba_train.optimizer import build_optimizer, parameter_groups, set_learning_rate
from tiny import TINY_LLAMA

SHAPE = {key: value for key, value in TINY_LLAMA.items() if key != "model_type"}


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SHAPE), LlamaConfig(**SHAPE, tie_word_embeddings=True), Qwen2Config(**SHAPE)],
    ids=["llama", "llama with tied embeddings", "qwen2 with biases"],
)
def test_matrices_decay_and_nothing_else(config) -> None:
    model = AutoModelForCausalLM.from_config(config)
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices = {names[id(parameter)] for parameter in decayed["params"]}
    assert all(name.endswith("_proj.weight") or name == "lm_head.weight" for name in matrices)
    assert ("lm_head.weight" in matrices) is not config.tie_word_embeddings
    others = {names[id(parameter)] for parameter in kept["params"]}
    assert "model.embed_tokens.weight" in others
    assert matrices | others == set(names.values()) and not matrices & others


def test_frozen_parameters_are_left_out() -> None:
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert [len(group["params"]) for group in groups] == [1]


def test_the_schedule_sets_the_rate_of_every_group() -> None:
    optimizer = build_optimizer(torch.nn.Linear(3, 2), OptimizerConfig(beta1=0.8, eps=1e-6), fused=False)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert all(group["betas"] == (0.8, 0.95) and group["eps"] == 1e-6 for group in optimizer.param_groups)
