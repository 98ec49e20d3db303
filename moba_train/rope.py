"""Change the rotary position embedding of a live model.

Editing ``config.rope_parameters`` alone changes nothing: the frequencies were computed when the rotary module was
built. ``set_rope`` therefore builds a new module from the changed configuration. Its frequencies are fp32 whatever
the model's dtype is: bf16 frequencies shift positions beyond a few thousand tokens by whole tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from moba_train.config import RopeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Keys that belong to one rope_type and would be refused, or wrongly used, by another.
_TYPE_BOUND = {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale"}

# Types whose frequencies transformers takes from the largest position of a forward pass.
LENGTH_BOUND = ("dynamic", "longrope")


def rope_parameters(present: dict[str, Any], rope: RopeConfig) -> dict[str, Any]:
    """transformers' ``rope_parameters`` that ``rope`` makes of the ``present`` ones.

    Raises:
        ValueError: an unknown type, a base of 0 or below, a scaled type without a factor of at least 1, or YaRN/llama3
            without the original context length.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # not needed by who only composes

    parameters = dict(present)
    if rope.rope_type is not None and rope.rope_type != parameters.get("rope_type"):
        parameters = {key: value for key, value in parameters.items() if key not in _TYPE_BOUND}
        parameters["rope_type"] = rope.rope_type
    for key in ("rope_theta", "factor", "original_max_position_embeddings"):
        value = getattr(rope, key)
        if value is not None:
            parameters[key] = value
    parameters.update(rope.extra)
    kind = parameters["rope_type"]
    known = sorted({"default", *ROPE_INIT_FUNCTIONS})
    if kind not in known:
        raise ValueError(f"rope.rope_type={kind} is unknown: choose from {', '.join(known)}")
    if not parameters.get("rope_theta", 1) > 0:
        raise ValueError(f"rope.rope_theta={parameters['rope_theta']}: must be above 0")
    if "factor" in parameters and not parameters["factor"] >= 1:
        raise ValueError(f"rope.factor={parameters['factor']}: must be at least 1 (new / original context length)")
    if kind in ("linear", "dynamic", "yarn", "llama3", "longrope") and "factor" not in parameters:
        raise ValueError(f"rope.rope_type={kind} needs rope.factor (new context length / original context length)")
    if kind in ("yarn", "llama3") and "original_max_position_embeddings" not in parameters:
        raise ValueError(
            f"rope.rope_type={kind} needs rope.original_max_position_embeddings, the context it was trained at"
        )
    return parameters


def set_rope(model: PreTrainedModel, parameters: dict[str, Any], context_length: int) -> None:
    """Give ``model`` new rotary embeddings, in place; positions up to ``context_length`` become legal.

    Args:
        model: a Llama-shaped model: one ``rotary_emb`` module, built from the configuration alone.
        parameters: transformers' ``rope_parameters``.
        context_length: tokens; ``max_position_embeddings`` becomes at least this.

    Raises:
        ValueError: the model has no such module, or transformers refuses the parameters.
    """
    backbone = model.base_model
    old = getattr(backbone, "rotary_emb", None)
    if not isinstance(old, nn.Module) or not hasattr(old, "inv_freq"):
        raise ValueError(
            f"{type(model).__name__} keeps no rotary_emb module on its backbone: its RoPE cannot be changed"
        )
    config = model.config
    config.rope_parameters = dict(parameters)
    # Dynamic NTK scales by the length beyond max_position_embeddings, so there the original length stays.
    if parameters["rope_type"] != "dynamic":
        config.max_position_embeddings = max(config.max_position_embeddings, context_length)
    config.standardize_rope_params()
    config.validate_rope()
    new = type(old)(config=config)
    backbone.rotary_emb = new.to(next(old.buffers()).device)
