"""Load or build a Hugging Face causal LM that attends through ``moba_train.hf_attention``.

No parameter is added or renamed: a dense model's checkpoint loads unchanged and saves unchanged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moba_train import hf_attention
from moba_train.config import ModelConfig, Precision

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


def model_configuration(model: ModelConfig) -> PretrainedConfig:
    """The Hugging Face configuration of a model, without its weights.

    The checkpoint's own configuration wins: ``architecture`` describes a new model and is refused beside a ``path``.

    Raises:
        ValueError: neither or both of path and architecture, a folder without config.json, an unknown model_type.
    """
    if (model.path is None) == (not model.architecture):
        raise ValueError(
            f"model.path={model.path} and model.architecture={dict(model.architecture)}: give a path to load, "
            f"or an architecture to start from random weights, and not both"
        )
    if model.path is None:
        keywords = dict(model.architecture)
        kind = keywords.pop("model_type", None)
        if kind is None:
            raise ValueError("model.architecture has no model_type: add one, for example model_type: llama")
        return AutoConfig.for_model(kind, **keywords)
    looks_local = model.path.startswith((".", "/", "~")) or model.path.count("/") != 1
    folder = Path(model.path).expanduser()
    if looks_local and not folder.is_dir():
        raise ValueError(
            f"model.path={model.path} is not a folder: give a Hugging Face model folder, or fetch it first"
        )
    if folder.is_dir() and model.gguf_file is None and not (folder / "config.json").is_file():
        raise ValueError(f"model.path={model.path} holds no config.json: give a Hugging Face model folder")
    return AutoConfig.from_pretrained(_location(model), trust_remote_code=False, **_gguf(model))


def load_model(model: ModelConfig, precision: Precision) -> PreTrainedModel:
    """The model in ``precision``, on the CPU, with the attention implementation ``moba`` and no plan yet.

    A new model's weights come from torch's global generator, so seed it before.
    """
    hf_attention.register()
    keywords: dict[str, Any] = {"dtype": DTYPES[precision], "attn_implementation": hf_attention.NAME}
    if model.path is None:
        return AutoModelForCausalLM.from_config(model_configuration(model), **keywords)
    model_configuration(model)  # its checks of the folder
    return AutoModelForCausalLM.from_pretrained(_location(model), trust_remote_code=False, **keywords, **_gguf(model))


def _location(model: ModelConfig) -> str:
    assert model.path is not None
    folder = Path(model.path).expanduser()
    return str(folder) if folder.is_dir() else model.path


def _gguf(model: ModelConfig) -> dict[str, str]:
    return {} if model.gguf_file is None else {"gguf_file": model.gguf_file}


def tokenizer_path(model: ModelConfig) -> str:
    """Where the model's tokenizer is: ``model.tokenizer``, or the model's own folder.

    Raises:
        ValueError: a new model without ``model.tokenizer``.
    """
    if model.tokenizer is not None:
        return model.tokenizer
    if model.path is None:
        raise ValueError(
            "model.tokenizer is not set and model.path is None: name a tokenizer.json, a folder or a hub name"
        )
    return _location(model)
