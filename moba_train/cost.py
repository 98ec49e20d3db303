"""Exact arithmetic of a step: keys read, floating-point operations, parameters. No torch.

Conventions: a multiply and an add are two operations; softmax, norms, rotations and other work that grows with
tokens alone are left out, as in every published utilisation; `model` counts each product of the forward pass once
and twice more for the backward pass; `hardware` adds what is computed again (attention's scores in the backward
pass, checkpointed layers, the loss's logits). MoBA is counted with the keys its queries really read.

Legend: n tokens of a segment, B block_size, H query heads, K kv heads, D head_dim.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike


class LayerPlan(Protocol):
    """What is read of a layer's attention specification."""

    @property
    def kind(self) -> str: ...
    @property
    def block_size(self) -> int | None: ...
    @property
    def top_k(self) -> int | None: ...


# Dense bf16 tensor-core peaks in TFLOP/s, from the vendors' data sheets (half of what they print "with sparsity").
# The first pattern found in the device's name counts, so the rarer board stands before the common one.
_PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"GB200", 2500),
    (r"B200", 2250),
    (r"H[12]00 NVL", 835.5),
    (r"H[18]00 PCIe", 756.5),
    (r"GH200|H[12]00|H800", 989.4),
    (r"A[18]00\b", 312),
    (r"L40S", 362),
    (r"L4\b", 121),
    (r"A40\b", 149.7),
    (r"A10\b", 125),
    (r"RTX 4090", 165.2),
    (r"RTX 3090", 71),
    (r"MI300X", 1307.4),
)


def device_peak_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by the name its driver gives; None where the name is not in the table."""
    for pattern, tflops in _PEAK_TFLOPS:
        if re.search(pattern, name):
            return tflops * 1e12
    return None


def _own(config: Any, name: str) -> Any:
    """A size of all layers; None where the configuration names none."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' way to say so
        raise ValueError(
            f"model_type={config.model_type}: its layers have no {name} in common; use a Llama-shaped decoder"
        ) from None


def full_keys(lengths: ArrayLike) -> int:
    """Keys read by all queries of causal segments under full attention, one head: sum of n (n + 1) / 2."""
    n = np.asarray(lengths, dtype=np.int64)
    return int((n * (n + 1) // 2).sum())


def moba_keys(lengths: ArrayLike, block_size: int, top_k: int) -> int:
    """Keys read by all queries of the segments under MoBA, one head.

    A query reads its own block up to itself, and min(top_k - 1, earlier blocks) whole blocks.
    """
    n = np.asarray(lengths, dtype=np.int64)
    blocks, tail = n // block_size, n % block_size
    own = blocks * (block_size * (block_size + 1) // 2) + tail * (tail + 1) // 2
    chosen = top_k - 1
    growing = np.minimum(blocks, chosen + 1)  # the first blocks have fewer than `chosen` before them
    whole_blocks = growing * (growing - 1) // 2 + (blocks - growing) * chosen
    earlier = block_size * (whole_blocks * block_size + tail * np.minimum(chosen, blocks))
    return int((own + earlier).sum())


def gate_scores(lengths: ArrayLike, block_size: int) -> int:
    """(query, earlier block) pairs of the segments, one head: what the gate scores."""
    n = np.asarray(lengths, dtype=np.int64)
    blocks, tail = n // block_size, n % block_size
    return int((block_size * (blocks * (blocks - 1) // 2) + tail * blocks).sum())


def sparsity(block_size: int, top_k: int, length: int) -> float:
    """Share of a context's keys that its last queries do not read: 1 - top_k * block_size / length, at least 0."""
    return max(0.0, 1.0 - top_k * block_size / length)


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a Llama-shaped causal LM (Llama, Mistral, Qwen2, Qwen3 …) that its cost follows from."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_size: int
    vocab_size: int
    tied: bool  # the head is the embedding's matrix
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    key_conv: int = 0  # width of the convolution on keys, whose operations grow with tokens alone

    @classmethod
    def from_config(cls, config: Any) -> DecoderShape:
        """Of a Hugging Face configuration object.

        Raises:
            ValueError: a configuration without the sizes of a Llama-shaped decoder, or with experts
        """
        kind = getattr(config, "model_type", type(config).__name__)
        if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
            raise ValueError(f"model_type={kind}: the cost of experts is not counted; use a dense decoder")
        needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
        if missing := [name for name in needed if _own(config, name) is None]:
            raise ValueError(
                f"model_type={kind} has no {missing[0]} of its own; use a Llama-shaped decoder (Llama, Mistral, Qwen)"
            )
        if wrong := [name for name in needed if getattr(config, name) < 1]:
            raise ValueError(f"{wrong[0]}={getattr(config, wrong[0])} of model_type={kind}: must be at least 1")
        heads = config.num_attention_heads
        bias = bool(getattr(config, "attention_bias", False))
        return cls(
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            heads=heads,
            kv_heads=_own(config, "num_key_value_heads") or heads,
            head_dim=_own(config, "head_dim") or config.hidden_size // heads,
            mlp_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            qkv_bias=bias or kind == "qwen2",  # Qwen2's is not a setting
            out_bias=bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=kind == "qwen3",
            key_conv=getattr(config, "key_conv", 0),
        )

    @property
    def layer_matrix_parameters(self) -> int:
        """Weights of one layer's linear maps: q, k, v, o and the gated MLP."""
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden_size * self.mlp_size

    @property
    def parameters(self) -> int:
        """All parameters, embeddings and norms included, a tied head once."""
        layer = self.layer_matrix_parameters + 2 * self.hidden_size
        layer += self.qkv_bias * self.head_dim * (self.heads + 2 * self.kv_heads)
        layer += self.out_bias * self.hidden_size
        layer += self.mlp_bias * (2 * self.mlp_size + self.hidden_size)
        layer += self.qk_norm * 2 * self.head_dim
        layer += self.key_conv * self.kv_heads * self.head_dim
        embedding = self.vocab_size * self.hidden_size
        return self.layers * layer + self.hidden_size + embedding * (1 if self.tied else 2)


@dataclass(frozen=True)
class StepCost:
    """Floating-point operations of a step or of a part of one, forward and backward."""

    model_flops: float
    hardware_flops: float

    def __add__(self, other: StepCost) -> StepCost:
        return StepCost(self.model_flops + other.model_flops, self.hardware_flops + other.hardware_flops)


def step_cost(
    shape: DecoderShape,
    plan: Sequence[LayerPlan],
    lengths: ArrayLike,
    *,
    activation_checkpointing: bool = False,
    keep_attention: bool = False,
    keep_choices: bool = True,
) -> StepCost:
    """Cost of one forward and backward pass over packed segments.

    Args:
        plan: one specification a layer
        lengths: tokens of each segment, padding among them where it is computed; empty segments count nothing
        activation_checkpointing: every layer's forward pass, the gate left out, is computed once more
        keep_attention: of that, attention is left out too
        keep_choices: False: the gate is not left out

    Raises:
        ValueError: the plan is not as long as the model is deep
    """
    if len(plan) != shape.layers:
        raise ValueError(f"a plan of {len(plan)} layers for a model of {shape.layers}; give one specification a layer")
    tokens = int(np.asarray(lengths, dtype=np.int64).sum())
    linear = 2.0 * tokens * shape.layer_matrix_parameters * shape.layers
    head = 2.0 * tokens * shape.vocab_size * shape.hidden_size
    pairs = 2.0 * shape.heads * shape.head_dim  # of one product over (query, key) or (query, block) pairs
    attention = gate = 0.0
    for sizes, layers in Counter(_moba_sizes(spec) for spec in plan).items():
        if sizes is None:
            attention += layers * 2 * pairs * full_keys(lengths)
        else:
            block_size, top_k = sizes
            attention += layers * 2 * pairs * moba_keys(lengths, block_size, top_k)
            gate += layers * pairs * gate_scores(lengths, block_size) * (top_k > 1)
    forward = linear + attention + gate
    # Backward: two products for each of the forward's; the gate has none, its choice carries no gradient.
    model = forward + head + 2 * (linear + attention + head)
    # Flash-style kernels form the scores anew: five products where the forward has two.
    again = activation_checkpointing * (linear + attention * (not keep_attention) + gate * (not keep_choices))
    hardware = model + 0.5 * attention + again
    return StepCost(model, hardware)


def _moba_sizes(spec: LayerPlan) -> tuple[int, int] | None:
    """(block_size, top_k) of a MoBA layer, None of a full one."""
    if spec.kind != "moba":
        return None
    assert spec.block_size is not None and spec.top_k is not None
    return spec.block_size, spec.top_k
