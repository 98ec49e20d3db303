"""What one layer of a transformers decoder holds while it is computed, in bytes a token.

Read off the code that runs: transformers' Llama layer in bf16 with norms in fp32, our attention operators, and the
order in which autograd frees what it kept. tests/plan/test_memory.py counts the same on the real model.

Legend: h hidden_size, q and k numbers of a token's queries and keys, m mlp_size, H query heads.
"""

from __future__ import annotations

from moba_train.attention.spec import AttentionSpec
from moba_train.plan.setup import Setup

HALF, SINGLE = 2, 4  # bytes of bf16 and fp32

# As attention/kernels/plan.py cuts its work.
_WORKSPACE_SHARE = 0.5
_WORKSPACE_FLOOR = 64 << 20
_ENTRY_BYTES = 24


def hidden_state(setup: Setup) -> int:
    """A layer's input, which checkpointing keeps."""
    return HALF * setup.shape.hidden_size


def norm_kept(setup: Setup) -> int:
    """Of one norm: its input in fp32, the input normalised, and the result that the next projections read."""
    return (SINGLE + HALF + HALF) * setup.shape.hidden_size + SINGLE


def attention_kept(setup: Setup) -> int:
    """Rotated queries and keys, values, the output and its log-sum-exp."""
    return HALF * 2 * (setup.query_size + setup.key_size) + SINGLE * setup.shape.heads


def mlp_kept(setup: Setup) -> int:
    """gate, silu(gate), up and their product."""
    return HALF * 4 * setup.shape.mlp_size


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
    return 2 * norm_kept(setup) + attention_kept(setup) + mlp_kept(setup)


def mlp_backward(setup: Setup) -> int:
    """A layer's most, as a rule: inside the product of silu(gate) and up, with its gradient and both factors' made.

    The product itself is gone by then; the residual's gradient waits.
    """
    product = HALF * setup.shape.mlp_size
    return kept(setup) - product + 3 * product + hidden_state(setup)


def norm_backward(setup: Setup) -> int:
    """In the second norm, when the MLP is done and the residual's gradient waits."""
    return norm_kept(setup) + attention_kept(setup) + last_norm_backward(setup) + hidden_state(setup)


def last_norm_backward(setup: Setup) -> int:
    """In a norm: what it kept, its gradient in bf16 and four terms of it in fp32."""
    h = setup.shape.hidden_size
    return (SINGLE + HALF) * h + SINGLE + (HALF + 4 * SINGLE) * h


def attention_backward(setup: Setup, spec: AttentionSpec) -> float:
    """In attention, when the MLP and the second norm are done: gradients of the output, queries, keys and values."""
    gradients = HALF * (2 * setup.query_size + 2 * setup.key_size) + SINGLE * setup.shape.heads
    return (
        norm_kept(setup)
        + attention_kept(setup)
        + hidden_state(setup)  # the residual's gradient
        + gradients
        + workspace(setup, spec)
    )


def workspace(setup: Setup, spec: AttentionSpec) -> float:
    """Of attention's backward pass: FlashAttention's fp32 dQ and ungrouped dK, dV, or MoBA's partial dQ by chunks."""
    if spec.kind == "full":
        grouped = setup.key_size < setup.query_size
        return SINGLE * setup.query_size + grouped * 2 * HALF * setup.query_size
    tokens = setup.rows * setup.stage.context_length
    kv_heads = setup.key_size // setup.shape.head_dim // setup.sequence_parallel_size
    group = setup.query_size // setup.key_size
    head_token = group * chosen(setup, spec) * (HALF * setup.shape.head_dim + _ENTRY_BYTES)
    whole = 4 * (group + 1) * kv_heads * tokens * setup.shape.head_dim * HALF
    room = max(_WORKSPACE_FLOOR, int(_WORKSPACE_SHARE * whole))
    if not head_token:
        return 0.0
    at_once = min(kv_heads, max(1, room // (head_token * tokens)))
    chunks = -(-kv_heads // at_once)
    return min(-(-kv_heads // chunks) * head_token * tokens, max(room, head_token)) / setup.tokens
