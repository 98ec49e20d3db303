"""Gradients from the forward's choices, without atomics: every sum has one owner and one order.

row_dot        delta = sum(out * d_out) of each row. Reads both once.
routed_query   like ``forward``, a program owns BLOCK_M entries of one list and sums their dQ over the block's keys: one
               partial dQ for each entry. 3 products; per entry 2 D elements gathered, D written.
merge_query    like ``merge``, a program owns BLOCK_M consecutive rows: dQ from the own block plus the R partial ones.
pad_lists      the lists in whole tiles, each entry with its row, log-sum-exp and delta: 16 bytes written an entry.
               Padding repeats the list's last row with an infinite log-sum-exp, so its weights are 0: the loop over a
               list needs no mask, its loads are wide, and it has half the instructions.
key_value      a program owns BLOCK_N keys of one block and kv head. It runs over the block's whole list, in ascending
               order, then over the rows of the own block, and writes dK and dV once. 4 products; per entry and key tile
               2 D elements gathered (from L2 when the block's tiles run side by side). Where one tile holds the block's
               keys (QUERY), it also writes the entries' partial dQ, and routed_query has nothing left to do.
"""

import triton
import triton.language as tl

from moba_train.attention.kernels.forward import find_tile
from moba_train.attention.kernels.merge import own_bounds
from moba_train.attention.kernels.rows import NUMBERS, load_keys, load_rows, row_offsets, store_rows


@triton.jit(do_not_specialize=NUMBERS)
def row_dot_kernel(
    p_out, p_d_out, p_delta, W, K, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):
    i_kv = tl.program_id(1)
    o_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < W
    # (BLOCK_M, BLOCK_D) each
    o_out = row_offsets(o_row, i_kv, K, G, D)
    b_out = load_rows(p_out, o_out, m_row, D, BLOCK_D).to(tl.float32)
    b_d_out = load_rows(p_d_out, o_out, m_row, D, BLOCK_D).to(tl.float32)
    tl.store(p_delta + i_kv.to(tl.int64) * W + o_row, tl.sum(b_out * b_d_out, 1), mask=m_row)


@triton.jit
def _query_step(b_query, b_d_out, b_lse, b_delta, b_key, b_value, m_read, b_d_query, scale, MASKED: tl.constexpr):
    """Add one tile of keys to dQ, still unscaled."""
    b_weight = tl.exp2(tl.dot(b_query, tl.trans(b_key)) * scale - b_lse[:, None])
    if MASKED:
        b_weight = tl.where(m_read, b_weight, 0.0)
    b_d_weight = tl.dot(b_d_out, tl.trans(b_value))
    b_d_scores = (b_weight * (b_d_weight - b_delta[:, None])).to(b_key.dtype)
    return tl.dot(b_d_scores, b_key, b_d_query)


@triton.jit(do_not_specialize=NUMBERS)
def routed_query_kernel(
    p_query,
    p_key,
    p_value,
    p_d_out,
    p_lse,
    p_delta,
    p_bounds,
    p_lists,
    p_of_list,
    p_offsets,
    p_entries,
    p_partial,
    scale,
    i_kv_start,
    i_entry_start,
    n_entries,
    W,
    LISTS,
    N,
    P,
    i_part,
    n_parts,
    K,
    LOG2_E: tl.constexpr,
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
    o_row = o_entry // R
    # (BLOCK_M,) and (BLOCK_M, BLOCK_D), two each
    b_lse = tl.load(p_lse + i_kv.to(tl.int64) * W + o_row)
    b_delta = tl.load(p_delta + i_kv.to(tl.int64) * W + o_row)
    o_query = row_offsets(o_row, i_kv, K, G, D)
    b_query = load_rows(p_query, o_query, m_row, D, BLOCK_D, False)
    b_d_out = load_rows(p_d_out, o_query, m_row, D, BLOCK_D, False)
    b_d_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n_key in range(0, B, BLOCK_N):
        o_key = n_token + n_key + tl.arange(0, BLOCK_N)
        # (BLOCK_N, BLOCK_D) each
        b_key = load_keys(p_key, o_key, n_token + B, i_kv, K, D, BLOCK_D, B % BLOCK_N != 0)
        b_value = load_keys(p_value, o_key, n_token + B, i_kv, K, D, BLOCK_D, B % BLOCK_N != 0)
        m_read = (o_key < n_token + B)[None, :]
        b_d_query = _query_step(
            b_query, b_d_out, b_lse, b_delta, b_key, b_value, m_read, b_d_query, scale, B % BLOCK_N != 0
        )
    o_partial = (i_list // N).to(tl.int64) * n_entries + (o_entry - i_entry_start)
    store_rows(p_partial, o_partial * D, b_d_query * (scale / LOG2_E), m_row, D, BLOCK_D)


@triton.jit
def _query_keys(
    p_key, p_value, b_query, b_d_out, b_lse, b_delta, b_begin, b_token, n_from, n_to, n_stop, b_d_query, scale, i_kv, K,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for n_key in range(n_from, n_to, BLOCK_N):
        o_key = n_key + tl.arange(0, BLOCK_N)
        # (BLOCK_N, BLOCK_D) each
        b_key = load_keys(p_key, o_key, n_stop, i_kv, K, D, BLOCK_D, MASKED)
        b_value = load_keys(p_value, o_key, n_stop, i_kv, K, D, BLOCK_D, MASKED)
        m_read = (o_key[None, :] >= b_begin[:, None]) & (o_key[None, :] <= b_token[:, None])
        b_d_query = _query_step(b_query, b_d_out, b_lse, b_delta, b_key, b_value, m_read, b_d_query, scale, MASKED)
    return b_d_query


@triton.jit(do_not_specialize=NUMBERS)
def merge_query_kernel(
    p_query,
    p_key,
    p_value,
    p_d_out,
    p_lse,
    p_delta,
    p_bounds,
    p_first,
    p_of_token,
    p_partial,
    p_d_query,
    scale,
    i_kv_start,
    i_row_start,
    n_rows,
    T,
    K,
    LOG2_E: tl.constexpr,
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
    b_token = o_row // G
    b_own = tl.load(p_of_token + b_token, mask=m_row, other=0)
    b_begin = tl.load(p_bounds + b_own)
    b_earlier = b_own - tl.load(p_first + b_own)
    # (BLOCK_M,) and (BLOCK_M, BLOCK_D), two each
    b_lse = tl.load(p_lse + i_kv.to(tl.int64) * T * G + o_row, mask=m_row, other=float("inf"))
    b_delta = tl.load(p_delta + i_kv.to(tl.int64) * T * G + o_row, mask=m_row, other=0.0)
    o_query = row_offsets(o_row, i_kv, K, G, D)
    b_query = load_rows(p_query, o_query, m_row, D, BLOCK_D)
    b_d_out = load_rows(p_d_out, o_query, m_row, D, BLOCK_D)
    b_d_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    o_partial = (i_part_kv.to(tl.int64) * n_rows + (o_row - i_row_start)) * R
    for i_choice in tl.range(R, num_stages=FOLD_STAGES):
        m_chosen = m_row & (i_choice < b_earlier)
        # (BLOCK_M, BLOCK_D)
        b_d_query += load_rows(p_partial, (o_partial + i_choice) * D, m_chosen, D, BLOCK_D).to(tl.float32)
    b_d_query *= LOG2_E / scale
    n_start, n_edge, n_plain, n_stop = own_bounds(p_bounds, p_of_token, n_row, T, G, BLOCK_M, BLOCK_N)
    b_d_query = _query_keys(
        p_key, p_value, b_query, b_d_out, b_lse, b_delta, b_begin, b_token, n_start, n_edge, n_stop, b_d_query, scale,
        i_kv, K, D, BLOCK_D, BLOCK_N, True,
    )  # fmt: skip
    b_d_query = _query_keys(
        p_key, p_value, b_query, b_d_out, b_lse, b_delta, b_begin, b_token, n_edge, n_plain, n_stop, b_d_query, scale,
        i_kv, K, D, BLOCK_D, BLOCK_N, False,
    )  # fmt: skip
    b_d_query = _query_keys(
        p_key, p_value, b_query, b_d_out, b_lse, b_delta, b_begin, b_token, n_plain, n_stop, n_stop, b_d_query, scale,
        i_kv, K, D, BLOCK_D, BLOCK_N, True,
    )  # fmt: skip
    store_rows(p_d_query, o_query, b_d_query * (scale / LOG2_E), m_row, D, BLOCK_D)


@triton.jit(do_not_specialize=NUMBERS)
def pad_lists_kernel(
    p_lists,
    p_of_list,
    p_offsets,
    p_entries,
    p_lse,
    p_delta,
    p_padded,
    p_padded_row,
    p_padded_lse,
    p_padded_delta,
    i_kv_start,
    W,
    LISTS,
    N,
    P,
    K,
    G: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    i_list, o_entry, m_row = find_tile(p_lists, p_of_list, p_offsets, p_entries, LISTS, N, P, 0, P, BLOCK_M)
    if i_list == LISTS:
        return
    # (BLOCK_M,)
    i_kv = i_kv_start + i_list // N
    o_row = i_kv.to(tl.int64) * W + o_entry // R
    b_lse = tl.load(p_lse + o_row, mask=m_row, other=float("inf"))
    b_delta = tl.load(p_delta + o_row, mask=m_row, other=0.0)
    o_padded = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(p_padded + o_padded, tl.where(m_row, o_entry, -1))
    tl.store(p_padded_row + o_padded, row_offsets(o_entry // R, i_kv, K, G, 1).to(tl.int32))
    tl.store(p_padded_lse + o_padded, b_lse)
    tl.store(p_padded_delta + o_padded, b_delta)


@triton.jit
def _key_value_step(
    p_query, p_d_out, b_lse, b_delta, o_query, o_token, m_row, b_key, b_value, b_d_key, b_d_value, o_key, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Add one tile of rows to dK (unscaled) and dV; also returns the gradient of its scores, (keys, rows). A row with
    an infinite log-sum-exp does not count. CAUSAL: rows where m_row holds, and keys up to their tokens."""
    # (BLOCK_M, BLOCK_D) each
    b_query = load_rows(p_query, o_query, m_row, D, BLOCK_D, CAUSAL)
    b_weight = tl.exp2(tl.dot(b_key, tl.trans(b_query)) * scale - b_lse[None, :])
    if CAUSAL:
        b_weight = tl.where(o_key[:, None] <= o_token[None, :], b_weight, 0.0)
    b_d_out = load_rows(p_d_out, o_query, m_row, D, BLOCK_D, CAUSAL)
    b_d_value = tl.dot(b_weight.to(b_d_out.dtype), b_d_out, b_d_value)
    b_d_weight = tl.dot(b_value, tl.trans(b_d_out))
    b_d_scores = (b_weight * (b_d_weight - b_delta[None, :])).to(b_query.dtype)
    b_d_key = tl.dot(b_d_scores, b_query, b_d_key)
    return b_d_key, b_d_value, b_d_scores


@triton.jit(do_not_specialize=NUMBERS)
def key_value_kernel(
    p_query,
    p_key,
    p_value,
    p_d_out,
    p_lse,
    p_delta,
    p_bounds,
    p_of_list,
    p_padded,
    p_padded_row,
    p_padded_lse,
    p_padded_delta,
    p_partial,
    p_d_key,
    p_d_value,
    scale,
    i_kv_start,
    n_kv,
    W,
    N,
    K,
    LOG2_E: tl.constexpr,
    QUERY: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The key tiles of a block run side by side, so that their common rows are gathered into L2 once. Blocks run in
    # order, over all kv heads: a segment's early blocks have the longest lists, and the longest work starts first.
    TILES: tl.constexpr = (B + BLOCK_N - 1) // BLOCK_N
    i_tile = tl.program_id(0) % TILES
    i_part_kv = tl.program_id(0) // TILES % n_kv
    i_block = tl.program_id(0) // TILES // n_kv
    i_kv = i_kv_start + i_part_kv
    n_key = tl.load(p_bounds + i_block) + i_tile * BLOCK_N
    n_key_stop = tl.load(p_bounds + i_block + 1)
    if n_key >= n_key_stop:
        return
    o_key = n_key + tl.arange(0, BLOCK_N)
    # (BLOCK_N, BLOCK_D) each; zero past the block: what those keys get is not stored
    b_key = load_keys(p_key, o_key, n_key_stop, i_kv, K, D, BLOCK_D, True)
    b_value = load_keys(p_value, o_key, n_key_stop, i_kv, K, D, BLOCK_D, True)
    b_d_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_d_value = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if R > 0:
        p_of_list += i_part_kv * N + i_block
        i_start = tl.load(p_of_list)
        i_stop = tl.load(p_of_list + 1)
        o_query = tl.load(p_padded_row + i_start * BLOCK_M + tl.arange(0, BLOCK_M))
        for i_list_tile in range(i_start, i_stop):
            o_list = i_list_tile * BLOCK_M + tl.arange(0, BLOCK_M)
            # Rows are read a tile ahead, so that the gathers can be pipelined: their addresses are there in time.
            o_ahead = tl.load(p_padded_row + o_list + BLOCK_M)
            b_lse = tl.load(p_padded_lse + o_list)
            b_delta = tl.load(p_padded_delta + o_list)
            b_d_key, b_d_value, b_d_scores = _key_value_step(
                p_query, p_d_out, b_lse, b_delta, o_query.to(tl.int64) * D, o_query, True, b_key, b_value, b_d_key,
                b_d_value, o_key, scale, D, BLOCK_D, False,
            )  # fmt: skip
            if QUERY:
                # A key past the block has the logit 0. Beside a row's own, far below that, its weight may be infinite,
                # which its zeros would not undo.
                if B % BLOCK_N != 0:
                    b_d_scores = tl.where((o_key < n_key_stop)[:, None], b_d_scores, 0.0)
                b_d_query = tl.dot(tl.trans(b_d_scores), b_key) * (scale / LOG2_E)
                o_entry = tl.load(p_padded + o_list)
                o_partial = i_part_kv.to(tl.int64) * W * R + o_entry
                store_rows(p_partial, o_partial * D, b_d_query, o_entry >= 0, D, BLOCK_D)
            o_query = o_ahead
    o_lse = i_kv.to(tl.int64) * W
    # Loaded again: knowing that this loop runs at least once, ptxas (seen with G = 1) moves the sums between registers
    # on the way into it, and then waits for every single product of both loops.
    n_row_stop = tl.load(p_bounds + i_block + 1) * G
    for n_row in range(n_key * G, n_row_stop, BLOCK_M):
        o_row = n_row + tl.arange(0, BLOCK_M)
        m_row = o_row < n_key_stop * G
        b_lse = tl.load(p_lse + o_lse + o_row, mask=m_row, other=float("inf"))
        b_delta = tl.load(p_delta + o_lse + o_row, mask=m_row, other=0.0)
        b_d_key, b_d_value, b_d_scores = _key_value_step(
            p_query, p_d_out, b_lse, b_delta, row_offsets(o_row, i_kv, K, G, D), o_row // G, m_row, b_key, b_value,
            b_d_key, b_d_value, o_key, scale, D, BLOCK_D, True,
        )  # fmt: skip
    o_store = (o_key.to(tl.int64) * K + i_kv) * D
    store_rows(p_d_key, o_store, b_d_key * (scale / LOG2_E), o_key < n_key_stop, D, BLOCK_D)
    store_rows(p_d_value, o_store, b_d_value, o_key < n_key_stop, D, BLOCK_D)
