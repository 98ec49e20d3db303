"""A model with key convolutions as a Hugging Face folder, which this package loads and plain transformers refuses.

    config.json                            the dense model's, but for ``model_type: moba_key_conv``
    model.without_key_conv.safetensors     its weights, under a name that nothing loads unasked
    key_conv.safetensors                   the convolutions' weights

Loaded without its convolutions the model would compute something else and say nothing. So neither the type nor the
weights' name is one that another loader takes, each of which alone stops it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

MODEL_TYPE = "moba_key_conv"
VARIANT = "without_key_conv"
FILE = "key_conv.safetensors"
_PARAMETER = ".key_conv.weight"


def own_configuration(location: str, local_files_only: bool = False) -> PretrainedConfig | None:
    """The dense model's configuration, with its ``key_conv`` set, of a folder or hub name that ``save`` wrote; None of
    any other."""
    settings, _ = PretrainedConfig.get_config_dict(location, local_files_only=local_files_only)
    if settings.get("model_type") != MODEL_TYPE:
        return None
    kind = settings.pop("base_model_type")
    return CONFIG_MAPPING[kind].from_dict({**settings, "model_type": kind})


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write configuration and weights; ``model.config.key_conv`` is the convolutions' width."""
    state = model.state_dict()
    convolutions = {name: tensor.contiguous().cpu() for name, tensor in state.items() if name.endswith(_PARAMETER)}
    dense = {name: tensor for name, tensor in state.items() if name not in convolutions}
    model.save_pretrained(folder, state_dict=dense, variant=VARIANT)
    save_file(convolutions, folder / FILE, metadata={"format": "pt"})
    file = folder / "config.json"
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    settings["base_model_type"], settings["model_type"] = settings["model_type"], MODEL_TYPE
    del settings["architectures"]
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_convolutions(model: nn.Module, location: str) -> None:
    """Fill the convolutions of ``model`` from a folder or hub name that ``save`` wrote.

    Raises:
        ValueError: the file's weights are not those of the model's convolutions.
    """
    file = cached_file(location, FILE)
    assert file is not None, "it raises where there is none"
    found = load_file(file)
    wanted = {name: parameter for name, parameter in model.named_parameters() if name.endswith(_PARAMETER)}
    if {name: tensor.shape for name, tensor in found.items()} != {name: p.shape for name, p in wanted.items()}:
        raise ValueError(f"{file} does not hold the key convolutions of its model's layers: give the whole folder")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])
