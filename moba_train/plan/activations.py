"""What one layer of a transformers decoder holds while it is computed, in bytes a token.

Read off the code that runs: transformers' Llama layer in bf16 with norms in fp32 (or Liger's kernels in their place),
our attention operators, and the order in which autograd frees what it kept. tests/plan/test_memory.py counts the same
on the real model, Liger's kernels apart, which need a GPU.

Legend: h hidden_size, q and k numbers of a token's queries and keys, m mlp_size, H query heads.
"""

from __future__ import annotations

from moba_train.attention.spec import AttentionSpec
from moba_train.plan.setup import HALF, SINGLE, Setup

# As attention/kernels/plan.py cuts its work.
_WORKSPACE_SHARE = 0.5
_WORKSPACE_FLOOR = 64 << 20
_ENTRY_BYTES = 24


def hidden_state(setup: Setup) -> int:
    """A layer's input, which checkpointing keeps."""
    return HALF * setup.shape.hidden_size


def norm_kept(setup: Setup, own_input: bool = True) -> int:
    """Of one norm: its input (in fp32 in plain torch), there also the input normalised, and the result.

    Args:
        own_input: nobody else keeps the input; a fused norm keeps it as it is.
    """
    h = setup.shape.hidden_size
    if setup.fused:
        return HALF * h * (1 + own_input) + SINGLE
    return (SINGLE + HALF + HALF) * h + SINGLE


def attention_kept(setup: Setup) -> int:
    """Rotated queries and keys, values, the output and its log-sum-exp."""
    return HALF * (setup.query_size + 2 * setup.key_size) + output_kept(setup)


def output_kept(setup: Setup) -> int:
    """Attention's output and log-sum-exp, which ``train.keep_attention`` keeps."""
    return HALF * setup.query_size + SINGLE * setup.shape.heads


def mlp_kept(setup: Setup) -> int:
    """gate, up and their product, in plain torch also silu(gate); a tiled MLP keeps nothing beside its input."""
    if setup.train.mlp_tile_tokens:
        return 0
    return HALF * (3 if setup.fused else 4) * setup.shape.mlp_size


def choices(setup: Setup, spec: AttentionSpec) -> int:
    """The gate's choices, which checkpointing keeps too."""
    if spec.kind == "full":
        return 0
    block_size, _ = spec.moba
    earlier = (setup.rows * setup.stage.context_length - 1) // block_size
    width = 1 if earlier <= 255 else 2 if earlier <= 32767 else 4
    return width * setup.shape.heads * chosen(setup, spec)


def chosen(setup: Setup, spec: AttentionSpec) -> int:
    """Earlier blocks of a query, at most."""
    block_size, top_k = spec.moba
    return min(top_k, (setup.stage.context_length - 1) // block_size + 1) - 1


def kept(setup: Setup) -> int:
    """All that autograd keeps of a layer, choices apart."""
    return _attention_part(setup) + norm_kept(setup) + mlp_kept(setup)


def _attention_part(setup: Setup) -> int:
    """Of the layer up to its second norm. A checkpoint holds its input."""
    return norm_kept(setup, own_input=not setup.train.activation_checkpointing) + attention_kept(setup)


def mlp_backward(setup: Setup) -> int:
    """In the MLP, while the residual's gradient waits: a layer's most, as a rule.

    Plain torch is inside the product of silu(gate) and up, with its gradient and both factors' made and the product
    gone. A fused kernel writes the factors' gradients over them, so the product's gradient beside it is most. A tiled
    MLP has the gradient of its input besides; its tile is in ``mlp_fixed``.
    """
    if setup.train.mlp_tile_tokens:
        return kept(setup) + 2 * hidden_state(setup)
    return kept(setup) + hidden_state(setup) + HALF * setup.shape.mlp_size * (1 if setup.fused else 2)


def mlp_fixed(setup: Setup) -> int:
    """Bytes in the MLP's backward pass that do not grow with the row: the gradient of its last weight. A tiled MLP: the
    fp32 sums of its weights' gradients, and either a tile's activations or, when the last tile is gone, the sums in
    bf16."""
    m, weight = setup.shape.mlp_size, setup.shape.hidden_size * setup.shape.mlp_size
    if not setup.train.mlp_tile_tokens:
        return HALF * weight
    tile = HALF * m * min(setup.train.mlp_tile_tokens, setup.tokens)
    within = 4 if setup.fused else 7
    return 3 * SINGLE * weight + max(within * tile, 3 * HALF * weight)


def norm_backward(setup: Setup) -> int:
    """In the second norm, when the MLP is done and the residual's gradient waits."""
    return _attention_part(setup) + last_norm_backward(setup) + hidden_state(setup)


def last_norm_backward(setup: Setup) -> int:
    """In a norm: what it kept and its gradient; plain torch also has four terms of that in fp32."""
    h = setup.shape.hidden_size
    if setup.fused:
        return 2 * HALF * h + SINGLE
    return (SINGLE + HALF) * h + SINGLE + (HALF + 4 * SINGLE) * h


def attention_backward(setup: Setup, spec: AttentionSpec) -> float:
    """In attention, when the MLP and the second norm are done: gradients of the output, queries, keys and values, and
    the residual's."""
    gradients = HALF * 2 * (setup.query_size + setup.key_size) + SINGLE * setup.shape.heads
    return _attention_part(setup) + hidden_state(setup) + gradients + workspace(setup, spec)


def workspace(setup: Setup, spec: AttentionSpec) -> float:
    """Of attention's backward pass. Dense: dQ in fp32. MoBA: the lists of all choices, and partial dQ of a chunk."""
    if spec.kind == "full":
        return SINGLE * setup.query_size
    tokens = setup.rows * setup.stage.context_length
    kv_heads = setup.key_size // setup.shape.head_dim // setup.sequence_parallel_size
    group = setup.query_size // setup.key_size
    head_token = group * chosen(setup, spec) * (HALF * setup.shape.head_dim + _ENTRY_BYTES)
    if not head_token:
        return 0.0
    whole = 4 * (group + 1) * kv_heads * tokens * setup.shape.head_dim * HALF
    room = max(_WORKSPACE_FLOOR, int(_WORKSPACE_SHARE * whole))
    at_once = min(kv_heads, max(1, room // (head_token * tokens)))
    chunks = -(-kv_heads // at_once)
    partial = min(-(-kv_heads // chunks) * head_token * tokens, max(room, head_token)) / setup.tokens
    return partial + SINGLE * kv_heads * group * chosen(setup, spec) * tokens / setup.tokens
