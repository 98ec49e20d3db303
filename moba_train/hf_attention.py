"""MoBA inside Hugging Face models: the only file that knows transformers' attention signature.

``register()`` adds the name ``moba`` to transformers' attention and mask interfaces, so that any Llama-shaped causal
LM loads with ``attn_implementation="moba"``; ``set_plan`` gives each layer its attention. The model's library code is
left alone. A mask that this attention cannot honour is refused, never dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function

from moba_train.attention import backends
from moba_train.attention.key_conv import KeyConvolution
from moba_train.attention.spec import AttentionSpec, check_bounds, check_inputs, check_scale

NAME = "moba"

# What other models pass along with their scores or masks and this attention does not compute.
_UNSUPPORTED = (
    *("sliding_window", "softcap", "s_aux", "sinks", "position_bias", "head_mask"),
    *("indices", "block_indices"),  # the keys that a model's own sparse attention has chosen
)
_NOT_CAUSAL = (
    "{} lets tokens read later ones (an encoder, or a model with is_causal=False), and the moba attention is causal: "
    "use a causal language model"
)


def register() -> None:
    """Add the name ``moba`` to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, refuse_masks)


def set_plan(model: PreTrainedModel, plan: Sequence[AttentionSpec], backend: str = "auto") -> None:
    """Give layer ``i`` the attention ``plan[i]``. Takes effect at the next forward pass.

    A named backend computes the layers of its kinds; for the rest, such as the full layers beside ``triton``'s MoBA,
    the backend is ``auto``, which logs what it takes.

    Raises:
        ValueError: the model does not attend through ``moba``, the plan's length is not its number of layers, or the
            backend is unknown.
    """
    found = str(model.config._attn_implementation)
    if not found.startswith(NAME):  # parallel.sequence adds to the name. With another the plan would change nothing
        raise ValueError(
            f"the model attends through {found!r}, which follows no plan: load it with attn_implementation={NAME!r}, "
            f"or call model.set_attn_implementation({NAME!r}) first"
        )
    layers = model.config.num_hidden_layers
    if len(plan) != layers:
        raise ValueError(f"plan has {len(plan)} entries for {layers} layers: give one AttentionSpec a layer")
    backends.check_name(backend)
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int):
            spec = plan[layer]
            computed = backend == "auto" or spec.kind in backends.BACKENDS[backend].kinds
            module.attention_spec = spec  # type: ignore[assignment]
            module.attention_backend = backend if computed else "auto"  # type: ignore[assignment]


def add_key_convolutions(model: PreTrainedModel, width: int) -> None:
    """Give every layer a ``KeyConvolution`` on its key projection's output, as ``self_attn.key_conv``, with weights 0.

    It acts before RoPE, and before Qwen3's norm on keys. The dense model's parameters keep their names. A layer's
    segment bounds are those of its attention, so the model must be called as ``attention_forward`` wants it.

    Raises:
        ValueError: the model's layers have no key projection of their own (a fused one, as Phi's).
    """
    layers = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int) and hasattr(m, "k_proj")]
    if len(layers) != model.config.num_hidden_layers:
        raise ValueError(
            f"attention.key_conv={width}: {model.config.model_type} has no k_proj in each of its layers; use a Llama, "
            f"Mistral or Qwen model, or attention.key_conv=0"
        )
    for layer in layers:
        projection: nn.Linear = layer.k_proj  # type: ignore[assignment]
        layer.key_conv = KeyConvolution(projection.out_features, width, projection.weight.dtype)
        layer.key_conv_bounds = []  # type: ignore[assignment]
        layer.register_forward_pre_hook(_before_layer, with_kwargs=True)
        _hook_projection(layer)
    model.config.key_conv = width


def _hook_projection(layer: Any) -> None:
    layer.k_proj.of_key_conv = (layer,)  # in a tuple it is no submodule; on the module, a deep copy has its own
    layer.k_proj.register_forward_hook(_after_projection)


def _before_layer(layer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Note the segment bounds of the pass that begins, or is recomputed: the projection sees hidden states alone."""
    if "of_key_conv" not in layer.k_proj.__dict__:  # PEFT has put a module of its own around it
        _hook_projection(layer)
    hidden = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
    given = keywords.get("cu_seq_lens_q")
    if given is None:
        batch, length, _ = hidden.shape
        given = segment_bounds(keywords.get("position_ids"), batch, length, hidden.device)
    layer.key_conv_bounds[:] = [given]


def _after_projection(projection: Any, _inputs: Any, key: torch.Tensor) -> torch.Tensor:
    (layer,) = projection.of_key_conv
    if projection is not layer.k_proj:  # PEFT's module, of which it has become a part, has the whole key
        return key
    return layer.key_conv(key, layer.key_conv_bounds.pop())


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Args:
        query: (batch, heads, length, head_dim); key and value: (batch, kv_heads, length, head_dim).
        attention_mask: must be None, which is what the registered mask function gives.
        cu_seq_lens_q, max_length_q: segment bounds over the flattened batch x length tokens, (segments + 1,) int32,
            and a bound on segment length: transformers' own packing keywords. Without them the bounds come from
            ``position_ids`` (a segment starts where they do not go up by one); with neither, one segment a row.

    Returns:
        output (batch, length, heads, head_dim), and None in the place of attention weights.

    Raises:
        ValueError: no plan was set; a model that is not causal; a mask, dropout, cache or score change that this
            attention cannot honour; segment bounds of another type or device, and, on a CPU, those that do not cover
            the tokens.
    """
    spec = getattr(module, "attention_spec", None)
    if spec is None:
        raise ValueError("this model has no attention plan: call moba_train.hf_attention.set_plan(model, plan) first")
    _refuse_unsupported(module, query, key, attention_mask, dropout, kwargs)
    query, key, value = _as_autocast_has_it(query, key, value)
    batch, heads, length, head_dim = query.shape
    if cu_seq_lens_q is None:
        cu_seq_lens_q = segment_bounds(position_ids, batch, length, query.device)
        max_length_q = length
    elif max_length_q is None:
        raise ValueError("cu_seq_lens_q is given and max_length_q is not: give the length of the longest segment")
    q, k, v = (x.transpose(1, 2).reshape(batch * length, x.shape[1], head_dim) for x in (query, key, value))
    _check_segments(q, k, v, cu_seq_lens_q, max_length_q)
    scale = head_dim**-0.5 if scaling is None else scaling
    check_scale(scale)
    attend = backends.resolve(module.attention_backend, q, k, spec)  # type: ignore[arg-type]
    output = attend(q, k, v, cu_seq_lens_q, max_length_q, spec, scale)
    return output.view(batch, length, heads, head_dim), None


def _as_autocast_has_it(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Under autocast RoPE leaves query and key in fp32, beside a value in autocast's type: all in that, as torch's own
    attention takes them there."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _check_segments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, max_length: int) -> None:
    """The bounds' values are looked at on a CPU alone: elsewhere every layer would wait for the device."""
    check_inputs(q, k, v, bounds)
    if bounds.device.type == "cpu" and (longest := check_bounds(bounds, len(q))) > max_length:
        raise ValueError(f"max_length_q is {max_length} and the longest segment has {longest} tokens: give that")


def segment_bounds(position_ids: torch.Tensor | None, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Bounds of the segments that ``position_ids`` (batch or 1, length) describe, (segments + 1,) int32.

    For callers who pack by positions alone. It reads data back from the device, once a layer: the training loop
    makes its bounds on the host instead, once a step.
    """
    if position_ids is None:
        return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
    starts = torch.ones(batch, length, dtype=torch.bool, device=device)
    starts[:, 1:] = (position_ids[:, 1:] != position_ids[:, :-1] + 1).expand(batch, -1)
    bounds = starts.flatten().nonzero().flatten()
    return torch.cat([bounds, bounds.new_tensor([batch * length])]).to(torch.int32)


def refuse_masks(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    config: Any = None,
    local_size: int | None = None,
    mask_function: Any = None,
    **kwargs: Any,
) -> None:
    """The mask function of this attention: there is none to build, and what would need one raises.

    Padding has no mask here: it is a segment of its own in ``cu_seq_lens_q``, or restarts ``position_ids``.

    Args:
        local_size: tokens that a query of this layer may look back over, a window's or those of a chunk (Llama 4).
        mask_function: says of a query and a key whether the one reads the other.
    """
    # Unions add to what a causal query reads, such as an image's later tokens; intersections keep it causal.
    if mask_function is bidirectional_mask_function or getattr(mask_function, "__name__", "") == "or_mask":
        raise ValueError(_NOT_CAUSAL.format(config.model_type))
    if q_length != kv_length:
        raise ValueError(_cache_message(q_length, kv_length))
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            "attention_mask has zeros, which the moba attention cannot honour: leave the mask out and make padding "
            "a segment of its own (position_ids that restart, or cu_seq_lens_q)"
        )
    if (window := sliding_window(config)) is not None:
        raise ValueError(
            f"sliding_window={window} of {config.model_type} is not part of moba or full attention: "
            f"set model.config.sliding_window = None if the model is to read its whole context"
        )
    if local_size is not None and local_size < kv_length:
        raise ValueError(
            f"{config.model_type} reads chunks of {local_size} tokens in some of its layers, which is not part of moba "
            f"or full attention: give sequences of at most that, or use another model"
        )


def sliding_window(config: Any) -> int | None:
    """The window of a model's configuration. Qwen's names one beside ``use_sliding_window=False``."""
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


def _refuse_unsupported(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> None:
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise ValueError(_NOT_CAUSAL.format(type(module).__name__))
    if mask is not None:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} cannot be honoured by the moba attention: pass None"
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(_cache_message(query.shape[2], key.shape[2]))
    if dropout:
        raise ValueError(
            f"attention_dropout={dropout} is not part of the moba attention: set it to 0 in the configuration"
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            shown = f"a tensor as {name}" if isinstance(kwargs[name], torch.Tensor) else f"{name}={kwargs[name]!r}"
            raise ValueError(f"{shown} is not part of the moba attention: use a model without it")


def _cache_message(q_length: int, kv_length: int) -> str:
    return (
        f"{q_length} queries against {kv_length} keys: the moba attention reads whole sequences; it does not "
        f"decode from a cache. Pass use_cache=False, or load the exported model with attn_implementation='sdpa'"
    )
