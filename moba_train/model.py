"""Load or build a Hugging Face causal LM that attends through ``moba_train.hf_attention``.

No parameter is renamed, and none is added but by ``attention.key_conv``: a dense model's checkpoint loads unchanged and
saves unchanged.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from moba_train import hub, key_conv_folder
from moba_train.config import ModelConfig, Precision
from moba_train.cost import DecoderShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHTS = (".safetensors", ".bin")
_MISMATCH = re.compile(r"size mismatch for (\S+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\]")  # torch's words
DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


def model_configuration(model: ModelConfig, weights: bool = True) -> PretrainedConfig:
    """The Hugging Face configuration of a model, without its weights.

    The checkpoint's own configuration wins: an ``architecture`` beside a ``path`` tells ``plan`` the sizes of a model
    that is not at hand, and must agree with it.

    Args:
        weights: refuse a folder without any.

    Raises:
        ValueError: neither path nor architecture, two that differ, a folder without config.json, an unknown model_type.
    """
    if model.path is None and not model.architecture:
        raise ValueError(
            "model.path and model.architecture are not set: give a path to load, or an architecture to start from "
            "random weights"
        )
    if model.path is None:
        return described_configuration(model)
    loaded = _loaded_configuration(model, weights)
    if model.architecture:
        _check_description(loaded, model)
    return loaded


def described_configuration(model: ModelConfig) -> PretrainedConfig:
    """The configuration that ``model.architecture`` describes.

    Raises:
        ValueError: no or an unknown model_type, or what is no setting of it.
    """
    keywords = dict(model.architecture)
    kind = keywords.pop("model_type", None)
    if kind is None:
        raise ValueError("model.architecture has no model_type: add one, for example model_type: llama")
    return _new_configuration(kind, keywords)


def planned_shape(model: ModelConfig, key_conv: int = 0) -> DecoderShape:
    """The sizes of a model, from ``model.architecture`` where it is given, else from its config.json: the weights need
    not be at hand.

    Args:
        key_conv: ``attention.key_conv``.

    Raises:
        ValueError: as ``model_configuration``, or no Llama-shaped decoder.
    """
    configuration = described_configuration(model) if model.architecture else model_configuration(model, weights=False)
    return replace(DecoderShape.from_config(configuration), key_conv=key_conv_width(configuration, key_conv))


def _check_description(loaded: PretrainedConfig, model: ModelConfig) -> None:
    for name, described in model.architecture.items():
        if name != "rope_parameters" and (found := getattr(loaded, name, None)) != described:
            raise ValueError(
                f"model.architecture.{name}={described} and model.path={model.path} has {found}: take out the "
                f"architecture, which a model that is loaded does not need, or correct it"
            )


def _loaded_configuration(model: ModelConfig, weights: bool) -> PretrainedConfig:
    assert model.path is not None
    looks_local = model.path.startswith((".", "/", "~")) or model.path.count("/") != 1
    folder = Path(model.path).expanduser()
    if looks_local and not folder.is_dir():
        raise ValueError(
            f"model.path={model.path} is not a folder: give a Hugging Face model folder, or fetch it first"
        )
    if folder.is_dir() and model.gguf_file is None and not (folder / "config.json").is_file():
        raise ValueError(f"model.path={model.path} holds no config.json: give a Hugging Face model folder")
    if weights and folder.is_dir() and model.gguf_file is None and not _holds_weights(folder):
        raise ValueError(f"model.path={model.path} holds no weights ({' or '.join(_WEIGHTS)}): give the whole folder")
    try:
        location, how = _location(model), _how(model)
        if model.gguf_file is None and (own := key_conv_folder.own_configuration(location, **how)) is not None:
            return own
        return AutoConfig.from_pretrained(location, trust_remote_code=False, **how)
    except Exception as error:  # what transformers raises of a config.json that is none is of many types
        raise ValueError(
            f"model.path={model.path} cannot be loaded ({_one_line(error)}): give a Hugging Face model folder"
        ) from None


def _holds_weights(folder: Path) -> bool:
    return any(file.suffix in _WEIGHTS for file in folder.iterdir())


def _new_configuration(kind: str, keywords: dict[str, Any]) -> PretrainedConfig:
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(kind, list(CONFIG_MAPPING), n=3) or ["llama", "mistral", "qwen3"]
        raise ValueError(f"model.architecture.model_type={kind} is unknown to transformers: try {' or '.join(near)}")
    known = CONFIG_MAPPING[kind]()
    # transformers would keep a mistyped keyword as one more attribute, and the default in its place.
    for name in keywords:
        if not _has(known, name):
            near = difflib.get_close_matches(name, vars(known), n=1)
            meant = f": did you mean {near[0]}?" if near else ": take it out"
            raise ValueError(f"model.architecture.{name} is no setting of {kind}{meant}")
    try:
        return CONFIG_MAPPING[kind](**keywords)
    except Exception as error:  # of as many types as there are configurations
        raise ValueError(f"model.architecture is no {kind}: {_one_line(error)}") from None


def _has(known: PretrainedConfig, name: str) -> bool:
    try:
        return hasattr(known, name)
    except RuntimeError:  # a size that layers differ in
        return True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def key_conv_width(configuration: PretrainedConfig, asked: int) -> int:
    """Width of the key convolutions: the model's own where it has some, else what ``attention.key_conv`` asks for.

    Raises:
        ValueError: the model has others than those asked for.
    """
    own = getattr(configuration, "key_conv", 0)
    if own and asked not in (0, own):
        raise ValueError(
            f"attention.key_conv={asked} and the model has key convolutions of width {own}: set it to {own}"
        )
    return own or asked


def load_model(model: ModelConfig, precision: Precision, key_conv: int = 0) -> PreTrainedModel:
    """The model in ``precision``, in training mode, with the attention implementation ``moba`` and no plan; on torch's
    default device unless it is loaded in parts (ZeRO 3).

    A new model's weights come from that device's global generator, so seed it before.

    Args:
        key_conv: ``attention.key_conv``; key convolutions that the model lacks are added with weights 0.

    Raises:
        ValueError: as ``model_configuration`` and ``key_conv_width``, or files that cannot be loaded.
    """
    # transformers' modelling code takes two seconds to import, and preflight reads configurations alone.
    from transformers import AutoModelForCausalLM

    from moba_train import hf_attention

    hf_attention.register()
    keywords: dict[str, Any] = {"dtype": DTYPES[precision], "attn_implementation": hf_attention.NAME}
    configuration = model_configuration(model)
    width = key_conv_width(configuration, key_conv)
    if model.path is None:
        new = AutoModelForCausalLM.from_config(configuration, **keywords)
        if width:
            hf_attention.add_key_convolutions(new, width)
        return new
    own = bool(getattr(configuration, "key_conv", 0))
    if own:
        keywords |= {"config": configuration, "variant": key_conv_folder.VARIANT}
    try:
        read: Any = AutoModelForCausalLM.from_pretrained(
            _location(model),
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # or its error would name none; they are refused below
            **keywords,
            **_how(model),
        )
        loaded, found = read
        _refuse_other_weights(model, found)
        if width:
            hf_attention.add_key_convolutions(loaded, width)
        if own:
            key_conv_folder.load_convolutions(loaded, _location(model))
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"model.path={model.path} cannot be loaded ({_one_line(error)}): copy or download the whole folder again"
        ) from None
    except RuntimeError as error:  # of loading in parts, on rank 0: transformers reports no shapes there
        if (mismatch := _MISMATCH.search(str(error))) is None:
            raise
        raise ValueError(_other_shape(model, *mismatch.groups())) from None
    # A loaded model comes in evaluation mode, without dropout and without activation checkpointing.
    return loaded.train()


def _refuse_other_weights(model: ModelConfig, found: dict[str, Any]) -> None:
    """Refuse files without some of the model's weights, which transformers would start from random numbers."""
    where = f"model.path={model.path}"
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{where} lacks weights that its config.json asks for ({len(missing)} of them, {missing[0]} first): give "
            f"the whole folder of a causal language model"
        )
    if found["mismatched_keys"]:
        name, *shapes = min(found["mismatched_keys"])
        raise ValueError(_other_shape(model, name, *(", ".join(map(str, shape)) for shape in shapes)))


def _other_shape(model: ModelConfig, name: str, saved: str, asked: str) -> str:
    return (
        f"model.path={model.path}: {name} has shape ({saved}), and by config.json ({asked}): give the two of one model"
    )


def _location(model: ModelConfig) -> str:
    assert model.path is not None
    folder = Path(model.path).expanduser()
    return str(folder) if folder.is_dir() else model.path


def _how(model: ModelConfig) -> dict[str, Any]:
    """How transformers is to load it, beside where from."""
    gguf = {} if model.gguf_file is None else {"gguf_file": model.gguf_file}
    return {"local_files_only": hub.out_of_reach(_location(model)), **gguf}


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
