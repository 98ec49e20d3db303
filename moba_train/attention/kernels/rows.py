"""Arithmetic that several kernels share: where a row lies, and one step of an online softmax.

Logits are kept in base 2: ``scale`` arrives multiplied by log2(e), and so do log-sum-exps leave.
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634

# Arguments whose value must not start another compilation: tensor sizes and places in the workspace.
NUMBERS = (
    "T", "W", "N", "K", "P", "LISTS", "n_part", "n_parts", "n_kv", "n_rows", "n_tiles", "n_entries", "i_part",
    "i_kv_start", "i_row_start", "i_entry_start",
)  # fmt: skip


@triton.jit
def row_offsets(o_row, i_kv, K, G: tl.constexpr, D: tl.constexpr):
    """Offsets of rows of kv head i_kv in a (T, H, D) tensor."""
    o_token = (o_row // G).to(tl.int64)
    return (o_token * K * G + i_kv * G + o_row % G) * D


@triton.jit
def load_rows(p_base, o_offset, m_row, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr = True):
    """(rows, BLOCK_D) at p_base + o_offset; zero past D and, if MASKED, where m_row is false."""
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_base + o_offset[:, None] + o_d[None, :]
    if MASKED and D == BLOCK_D:
        return tl.load(p_rows, mask=m_row[:, None], other=0.0)
    elif MASKED:
        return tl.load(p_rows, mask=m_row[:, None] & (o_d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        return tl.load(p_rows)
    else:
        return tl.load(p_rows, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def store_rows(p_base, o_offset, b_rows, m_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store (rows, BLOCK_D) in the element type of p_base."""
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_base + o_offset[:, None] + o_d[None, :]
    b_rows = b_rows.to(p_base.dtype.element_ty)
    if D == BLOCK_D:
        tl.store(p_rows, b_rows, mask=m_row[:, None])
    else:
        tl.store(p_rows, b_rows, mask=m_row[:, None] & (o_d < D)[None, :])


@triton.jit
def load_keys(p_base, o_token, n_stop, i_kv, K, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """(tokens, BLOCK_D) of kv head i_kv from a (T, K, D) tensor; zero from token n_stop on, if MASKED."""
    return load_rows(p_base, (o_token.to(tl.int64) * K + i_kv) * D, o_token < n_stop, D, BLOCK_D, MASKED)


@triton.jit
def softmax_step(b_scores, b_value, b_max, b_sum, b_out, scale):
    """Add one tile of keys to a running softmax: b_scores (rows, keys) unscaled, -inf where not to be read."""
    b_new = tl.maximum(b_max, tl.max(b_scores, 1) * scale)
    b_weight = tl.exp2(b_scores * scale - b_new[:, None])
    b_decay = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
    b_out = tl.dot(b_weight.to(b_value.dtype), b_value, b_out * b_decay[:, None])
    return b_new, b_sum, b_out
