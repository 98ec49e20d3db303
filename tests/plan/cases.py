"""Recipes of real size that are planned and never run."""

from __future__ import annotations

from moba_train.config import Config, FusedKernels, ModelConfig, Precision, StageConfig
from moba_train.model import planned_shape
from moba_train.plan.setup import Setup
from moba_train.schedule import build_schedule

LLAMA_1B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
LLAMA_8B = LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "head_dim": 128,
    "tie_word_embeddings": False,
}


def recipe(architecture: dict, context: int, **train) -> Config:
    config = Config()
    config.model = ModelConfig(architecture=architecture)
    config.schedule.stages = [StageConfig(tokens=64 * context, context_length=context)]
    config.train.tokens_per_step, config.train.precision, config.train.zero_stage = context, Precision.bf16, 1
    config.train.activation_checkpointing, config.train.fused_kernels = True, FusedKernels.none
    for key, value in train.items():
        setattr(config.train, key, value)
    return config


def setup_of(config: Config) -> Setup:
    return Setup(config, planned_shape(config.model), build_schedule(config).stages[0])


# Few layers and no long row: what is counted of it is parameters, gradients and optimizer state.
WIDE = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
