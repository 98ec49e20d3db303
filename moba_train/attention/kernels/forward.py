"""Listed queries against their block: one partial output for each entry.

Large blocks (routed): a program owns BLOCK_M entries of one (kv head, block) list, gathers their queries, and runs over
the block's keys with an online softmax: ordinary dense matrix products, no mask. Blocks of one key tile (resident): a
program owns a list, keeps the block's keys and values, and runs over the entries, BLOCK_M at a time. Either way a
result goes where its entry says, so that ``merge`` finds the R partial outputs of a row side by side.

Work: 4 x B x D operations an entry. Bytes an entry: D elements gathered and D elements + 4 bytes written. The block's
keys and values come from L2, once for each BLOCK_M entries (routed) or once (resident).
"""

import triton
import triton.language as tl

from moba_train.attention.kernels.rows import NUMBERS, load_keys, load_rows, row_offsets, softmax_step, store_rows


@triton.jit
def part_bounds(p_offsets, i_list, N, P, i_part, n_parts):
    """Where the entries of some parts of list i_list start and stop."""
    p_start = p_offsets + ((i_list // N).to(tl.int64) * (P + 1) + i_part) * N + i_list % N
    return tl.load(p_start), tl.load(p_start + n_parts.to(tl.int64) * N)


@triton.jit
def find_tile(p_lists, p_of_list, p_offsets, p_entries, LISTS, N, P, i_part, n_parts, BLOCK_M: tl.constexpr):
    """This program's list, its entries (BLOCK_M,) and which of them are real: past the end the last one repeats.
    List LISTS: nothing to do."""
    i_list = tl.load(p_lists + tl.program_id(0))
    o_entry = tl.zeros([BLOCK_M], tl.int32)
    m_row = o_entry > 0
    if i_list < LISTS:
        i_tile = tl.program_id(0) - tl.load(p_of_list + i_list)
        n_start, n_stop = part_bounds(p_offsets, i_list, N, P, i_part, n_parts)
        n_start += i_tile * BLOCK_M
        m_row = tl.arange(0, BLOCK_M) < n_stop - n_start
        o_entry = tl.load(p_entries + tl.minimum(n_start + tl.arange(0, BLOCK_M), n_stop - 1))
    return i_list, o_entry, m_row


@triton.jit
def attend_block(
    b_query, p_key, p_value, n_token, i_kv, scale, K, B: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Queries (BLOCK_M, BLOCK_D) with the B keys from n_token on: largest logit, sum of weights, sum of values."""
    b_max = tl.full([BLOCK_M], -1.0e30, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n_key in range(0, B, BLOCK_N):
        o_key = n_token + n_key + tl.arange(0, BLOCK_N)
        # (BLOCK_N, BLOCK_D) each
        b_key = load_keys(p_key, o_key, n_token + B, i_kv, K, D, BLOCK_D, B % BLOCK_N != 0)
        b_scores = tl.dot(b_query, tl.trans(b_key))
        if B % BLOCK_N != 0:
            b_scores = tl.where((o_key < n_token + B)[None, :], b_scores, -float("inf"))
        b_value = load_keys(p_value, o_key, n_token + B, i_kv, K, D, BLOCK_D, B % BLOCK_N != 0)
        b_max, b_sum, b_out = softmax_step(b_scores, b_value, b_max, b_sum, b_out, scale)
    return b_max, b_sum, b_out


@triton.jit(do_not_specialize=NUMBERS)
def routed_forward_kernel(
    p_query,
    p_key,
    p_value,
    p_bounds,
    p_lists,
    p_of_list,
    p_offsets,
    p_entries,
    p_partial,
    p_partial_lse,
    scale,
    i_kv_start,
    i_entry_start,
    n_entries,
    LISTS,
    N,
    P,
    i_part,
    n_parts,
    K,
    G: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_list, o_entry, m_row = find_tile(p_lists, p_of_list, p_offsets, p_entries, LISTS, N, P, i_part, n_parts, BLOCK_M)
    if i_list == LISTS:
        return
    i_kv = i_kv_start + i_list // N
    n_token = tl.load(p_bounds + i_list % N)
    # (BLOCK_M, BLOCK_D)
    b_query = load_rows(p_query, row_offsets(o_entry // R, i_kv, K, G, D), m_row, D, BLOCK_D, False)
    b_max, b_sum, b_out = attend_block(
        b_query, p_key, p_value, n_token, i_kv, scale, K, B, D, BLOCK_D, BLOCK_M, BLOCK_N
    )
    o_partial = (i_list // N).to(tl.int64) * n_entries + (o_entry - i_entry_start)
    store_rows(p_partial, o_partial * D, b_out / b_sum[:, None], m_row, D, BLOCK_D)
    tl.store(p_partial_lse + o_partial, b_max + tl.log2(b_sum), mask=m_row)


@triton.jit(do_not_specialize=NUMBERS)
def resident_forward_kernel(
    p_query,
    p_key,
    p_value,
    p_bounds,
    p_offsets,
    p_entries,
    p_partial,
    p_partial_lse,
    scale,
    i_kv_start,
    i_entry_start,
    n_entries,
    N,
    P,
    i_part,
    n_parts,
    K,
    G: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # One kv head after the other: what its entries read and write stays in L2 as far as it fits. A segment's early
    # blocks have the longest lists, and start first.
    i_part_kv = tl.program_id(0) // N
    i_block = tl.program_id(0) % N
    i_kv = i_kv_start + i_part_kv
    n_start, n_stop = part_bounds(p_offsets, i_part_kv * N + i_block, N, P, i_part, n_parts)
    if n_start >= n_stop:
        return
    n_token = tl.load(p_bounds + i_block)
    o_key = n_token + tl.arange(0, BLOCK_N)
    # (BLOCK_N, BLOCK_D) each
    b_key = load_keys(p_key, o_key, n_token + B, i_kv, K, D, BLOCK_D, B != BLOCK_N)
    b_value = load_keys(p_value, o_key, n_token + B, i_kv, K, D, BLOCK_D, B != BLOCK_N)
    o_list = n_start + tl.arange(0, BLOCK_M)
    o_entry = tl.load(p_entries + o_list, mask=o_list < n_stop, other=0)
    for n_entry in range(n_start, n_stop, BLOCK_M):
        o_list = n_entry + tl.arange(0, BLOCK_M)
        m_row = o_list < n_stop
        # Entries are read a tile ahead, so that the gathers can be pipelined: their addresses are there in time.
        o_ahead = tl.load(p_entries + o_list + BLOCK_M, mask=o_list + BLOCK_M < n_stop, other=0)
        # (BLOCK_M, BLOCK_D)
        b_query = load_rows(p_query, row_offsets(o_entry // R, i_kv, K, G, D), m_row, D, BLOCK_D, False)
        b_scores = tl.dot(b_query, tl.trans(b_key))
        if B != BLOCK_N:
            b_scores = tl.where((o_key < n_token + B)[None, :], b_scores, -float("inf"))
        b_max = tl.max(b_scores, 1) * scale
        b_weight = tl.exp2(b_scores * scale - b_max[:, None])
        b_sum = tl.sum(b_weight, 1)
        b_out = tl.dot(b_weight.to(b_value.dtype), b_value)
        o_partial = i_part_kv.to(tl.int64) * n_entries + (o_entry - i_entry_start)
        store_rows(p_partial, o_partial * D, b_out / b_sum[:, None], m_row, D, BLOCK_D)
        # 4 bytes of a sector of 32: they stay in L2, as far as they fit, until it is whole.
        tl.store(p_partial_lse + o_partial, b_max + tl.log2(b_sum), mask=m_row, eviction_policy="evict_last")
        o_entry = o_ahead
