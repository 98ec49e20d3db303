"""Causal attention in the own block, and the merge with the partial outputs of the chosen blocks.

A program owns BLOCK_M consecutive rows of one kv head. Segments and blocks need no tiles of their own: a row reads
the keys from its block's start to its token, so a tile runs from the first row's block start to its last token, and
only tiles of keys that some row does not read are masked. The softmax starts from the R partial outputs of the row,
folded by their log-sum-exp as if each were a key, in the order r = 0, 1, ...: first, because that part only moves bytes
and has its own layout of registers; the products then go on from its sum.

Bytes a row: query and output once, R x (D elements + 4) of partial outputs.
"""

import triton
import triton.language as tl

from moba_train.attention.kernels.rows import NUMBERS, load_keys, load_rows, row_offsets, softmax_step, store_rows


@triton.jit
def own_bounds(p_bounds, p_of_token, n_row, T, G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys that rows n_row to n_row + BLOCK_M read in their own blocks: masked up to the second bound and from the
    third on, unmasked between."""
    n_first = n_row // G
    n_last = tl.minimum((n_row + BLOCK_M - 1) // G, T - 1)
    n_start = tl.load(p_bounds + tl.load(p_of_token + n_first))
    n_shared = tl.load(p_bounds + tl.load(p_of_token + n_last))
    n_edge = n_start + tl.cdiv(n_shared - n_start, BLOCK_N) * BLOCK_N
    n_plain = n_edge + tl.maximum(n_first + 1 - n_edge, 0) // BLOCK_N * BLOCK_N
    return n_start, n_edge, n_plain, n_last + 1


@triton.jit
def _attend_keys(
    p_key, p_value, b_query, b_begin, b_token, n_from, n_to, n_stop, b_max, b_sum, b_out, scale, i_kv, K,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for n_key in range(n_from, n_to, BLOCK_N):
        o_key = n_key + tl.arange(0, BLOCK_N)
        # (BLOCK_N, BLOCK_D) each
        b_key = load_keys(p_key, o_key, n_stop, i_kv, K, D, BLOCK_D, MASKED)
        b_scores = tl.dot(b_query, tl.trans(b_key))
        if MASKED:
            m_read = (o_key[None, :] >= b_begin[:, None]) & (o_key[None, :] <= b_token[:, None])
            b_scores = tl.where(m_read, b_scores, -float("inf"))
        b_value = load_keys(p_value, o_key, n_stop, i_kv, K, D, BLOCK_D, MASKED)
        b_max, b_sum, b_out = softmax_step(b_scores, b_value, b_max, b_sum, b_out, scale)
    return b_max, b_sum, b_out


@triton.jit(do_not_specialize=NUMBERS)
def merge_kernel(
    p_query,
    p_key,
    p_value,
    p_bounds,
    p_first,
    p_of_token,
    p_partial,
    p_partial_lse,
    p_out,
    p_lse,
    scale,
    i_kv_start,
    i_row_start,
    n_rows,
    T,
    K,
    FOLD_STAGES: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_part_kv = tl.program_id(1)
    i_kv = i_kv_start + i_part_kv
    n_row = i_row_start + tl.program_id(0) * BLOCK_M
    o_row = n_row + tl.arange(0, BLOCK_M)
    m_row = o_row < i_row_start + n_rows
    # (BLOCK_M,) token, first key and number of earlier blocks of each row
    b_token = o_row // G
    b_own = tl.load(p_of_token + b_token, mask=m_row, other=0)
    b_begin = tl.load(p_bounds + b_own)
    b_earlier = b_own - tl.load(p_first + b_own)
    # (BLOCK_M, BLOCK_D)
    o_query = row_offsets(o_row, i_kv, K, G, D)
    b_query = load_rows(p_query, o_query, m_row, D, BLOCK_D)
    # Finite, so that a tile in which a row reads nothing leaves weights of 0 and not of NaN.
    b_max = tl.full([BLOCK_M], -1.0e30, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    o_partial = (i_part_kv.to(tl.int64) * n_rows + (o_row - i_row_start)) * R
    for i_choice in tl.range(R, num_stages=FOLD_STAGES):
        m_chosen = m_row & (i_choice < b_earlier)
        # (BLOCK_M,) and (BLOCK_M, BLOCK_D)
        b_other = tl.load(p_partial_lse + o_partial + i_choice, mask=m_chosen, other=-float("inf"))
        b_partial = load_rows(p_partial, (o_partial + i_choice) * D, m_chosen, D, BLOCK_D)
        b_new = tl.maximum(b_max, b_other)
        b_decay, b_weight = tl.exp2(b_max - b_new), tl.exp2(b_other - b_new)
        b_sum = b_sum * b_decay + b_weight
        b_out = b_out * b_decay[:, None] + b_partial.to(tl.float32) * b_weight[:, None]
        b_max = b_new
    n_start, n_edge, n_plain, n_stop = own_bounds(p_bounds, p_of_token, n_row, T, G, BLOCK_M, BLOCK_N)
    b_max, b_sum, b_out = _attend_keys(
        p_key, p_value, b_query, b_begin, b_token, n_start, n_edge, n_stop, b_max, b_sum, b_out, scale, i_kv, K,
        D, BLOCK_D, BLOCK_N, True,
    )  # fmt: skip
    b_max, b_sum, b_out = _attend_keys(
        p_key, p_value, b_query, b_begin, b_token, n_edge, n_plain, n_stop, b_max, b_sum, b_out, scale, i_kv, K,
        D, BLOCK_D, BLOCK_N, False,
    )  # fmt: skip
    b_max, b_sum, b_out = _attend_keys(
        p_key, p_value, b_query, b_begin, b_token, n_plain, n_stop, n_stop, b_max, b_sum, b_out, scale, i_kv, K,
        D, BLOCK_D, BLOCK_N, True,
    )  # fmt: skip
    store_rows(p_out, o_query, b_out / b_sum[:, None], m_row, D, BLOCK_D)
    tl.store(p_lse + i_kv.to(tl.int64) * T * G + o_row, b_max + tl.log2(b_sum), mask=m_row)
