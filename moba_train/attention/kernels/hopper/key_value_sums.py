"""The warpgroups of ``key_value``: each sums dK and dV of half of a program's keys.

``sum_gradients`` makes a tile's scores, their weights and gradients, and the sums one after the other; the tensor cores
have the other warpgroup's work meanwhile. ``sum_ahead`` serves head_dim 64, where there are registers for more: the
next tile's scores start behind this tile's sums, and keys and values are operands in registers. Shared memory, which a
product of 64 x 64 with both operands there keeps busy from start to end, is then read half as much.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moba_train.attention.kernels.hopper.shared import HALF


@gluon.jit
def _store_keys(p_base, s_store, b_sums, n_own, n_key_stop, i_kv, K, D: gl.constexpr):
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    s_store.store(b_sums.to(s_store.dtype))
    o_key = n_own + gl.arange(0, HALF, gl.SliceLayout(1, ROWS))
    o_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    p_rows = p_base + ((o_key.to(gl.int64) * K + i_kv) * D)[:, None] + o_d[None, :]
    gl.store(p_rows, s_store.load(ROWS), mask=(o_key < n_key_stop)[:, None])


@gluon.jit
def _add_rows(
    b_d_key, b_d_value, s_key, s_value, s_query, s_d_out, s_lse, s_delta, full, i_tile, o_key, n_row, n_row_stop,
    scale, G: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr,
    SUMS: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Add one tile of rows to dK (unscaled) and dV, whose products are on their way yet when it returns; also the
    gradient of its scores (HALF, BLOCK_M)."""
    TYPE: gl.constexpr = s_query.dtype
    i_slot = i_tile % STAGES
    s_row, s_grad = s_query.index(i_slot), s_d_out.index(i_slot)
    b_none = gl.zeros([HALF, BLOCK_M], gl.float32, SCORES)
    mbarrier.wait(full.index(i_slot), i_tile // STAGES & 1)
    b_scores = warpgroup_mma(s_key, s_row.permute((1, 0)), b_none, use_acc=False, is_async=True)
    b_d_weight = warpgroup_mma(s_value, s_grad.permute((1, 0)), b_none, use_acc=False, is_async=True)
    b_scores = warpgroup_mma_wait(1, deps=[b_scores])
    b_lse = s_lse.index(i_slot).load(gl.SliceLayout(0, SCORES))
    b_weight = gl.exp2(b_scores * scale - b_lse[None, :])
    if CAUSAL:
        o_row = n_row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, SCORES))
        m_read = (o_key[:, None] <= (o_row // G)[None, :]) & (o_row < n_row_stop)[None, :]
        b_weight = gl.where(m_read, b_weight, 0.0)
    b_left = gl.convert_layout(b_weight.to(TYPE), gl.DotOperandLayout(0, SUMS, 2))
    b_d_value = warpgroup_mma(b_left, s_grad, b_d_value, is_async=True)
    b_d_weight = warpgroup_mma_wait(1, deps=[b_d_weight])
    b_delta = s_delta.index(i_slot).load(gl.SliceLayout(0, SCORES))
    b_d_scores = (b_weight * (b_d_weight - b_delta[None, :])).to(TYPE)
    b_d_key = warpgroup_mma(
        gl.convert_layout(b_d_scores, gl.DotOperandLayout(0, SUMS, 2)), s_row, b_d_key, is_async=True
    )
    return b_d_key, b_d_value, b_d_scores


@gluon.jit
def sum_gradients(
    p_padded, p_partial, p_d_key, p_d_value, s_key, s_value, s_query, s_d_out, s_lse, s_delta, s_exchange, s_d_query,
    keys_full, full, free, exchanged, n_key, n_key_stop, i_start, n_list, n_tiles, n_row_stop, i_kv, o_partial, K,
    scale, LOG2_E: gl.constexpr, I_HALF: gl.constexpr, QUERY: gl.constexpr, G: gl.constexpr, D: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: dK and dV of half of the keys, and half of the columns of the entries' dQ."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    HALF_D: gl.constexpr = D // 2
    QUERIES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF_D, 16])
    ENTRIES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HALF_D, HALF_D // 8], [4, 1], [1, 0])
    TYPE: gl.constexpr = s_query.dtype
    n_own = n_key + I_HALF * HALF
    o_key = n_own + gl.arange(0, HALF, gl.SliceLayout(1, SCORES))
    b_d_key = gl.zeros([HALF, D], gl.float32, SUMS)
    b_d_value = gl.zeros([HALF, D], gl.float32, SUMS)
    mbarrier.wait(keys_full.index(0), 0)
    for i_tile in range(n_list):
        b_d_key, b_d_value, b_d_scores = _add_rows(
            b_d_key, b_d_value, s_key.index(I_HALF), s_value.index(I_HALF), s_query, s_d_out, s_lse, s_delta, full,
            i_tile, o_key, 0, n_row_stop, scale, G, D, BLOCK_M, STAGES, SCORES, SUMS, False,
        )  # fmt: skip
        if QUERY:
            # Two buffers: who is at tile i + 2 has seen both warpgroups past tile i + 1, and so past tile i's products.
            i_buffer = i_tile % 2 * 2
            s_exchange.index(i_buffer + I_HALF).store(b_d_scores)
            fence_async_shared()
            mbarrier.arrive(exchanged.index(0), count=1)
            o_m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, ENTRIES))
            o_entry = gl.load(p_padded + (i_start + i_tile) * BLOCK_M + o_m)
            mbarrier.wait(exchanged.index(0), i_tile & 1)
            b_d_query = gl.zeros([BLOCK_M, HALF_D], gl.float32, QUERIES)
            for i_half in gl.static_range(2):
                s_columns = s_key.index(i_half).slice(I_HALF * HALF_D, HALF_D, dim=1)
                s_rows = s_exchange.index(i_buffer + i_half).permute((1, 0))
                b_d_query = warpgroup_mma(s_rows, s_columns, b_d_query, is_async=True)
            b_d_query, b_d_key, b_d_value = warpgroup_mma_wait(0, deps=[b_d_query, b_d_key, b_d_value])
            mbarrier.arrive(free.index(i_tile % STAGES), count=1)
            s_d_query.index(I_HALF).store((b_d_query * (scale / LOG2_E)).to(TYPE))
            b_store = s_d_query.index(I_HALF).load(ENTRIES)
            o_d = I_HALF * HALF_D + gl.arange(0, HALF_D, gl.SliceLayout(0, ENTRIES))
            p_rows = p_partial + ((o_partial + o_entry) * D)[:, None] + o_d[None, :]
            gl.store(p_rows, b_store, mask=(o_entry >= 0)[:, None], eviction_policy="evict_first")
        else:
            b_d_key, b_d_value = warpgroup_mma_wait(0, deps=[b_d_key, b_d_value])
            mbarrier.arrive(free.index(i_tile % STAGES), count=1)
    n_before = n_list
    if I_HALF == 1 and not QUERY:  # of the own block's rows, those of tokens before the half read none of its keys
        n_before = gl.minimum(n_list + HALF * G // BLOCK_M, n_tiles)
        for i_tile in range(n_list, n_before):
            mbarrier.wait(full.index(i_tile % STAGES), i_tile // STAGES & 1)
            mbarrier.arrive(free.index(i_tile % STAGES), count=1)
    for i_tile in range(n_before, n_tiles):
        n_row = n_key * G + (i_tile - n_list) * BLOCK_M
        b_d_key, b_d_value, b_d_scores = _add_rows(
            b_d_key, b_d_value, s_key.index(I_HALF), s_value.index(I_HALF), s_query, s_d_out, s_lse, s_delta, full,
            i_tile, o_key, n_row, n_row_stop, scale, G, D, BLOCK_M, STAGES, SCORES, SUMS, True,
        )  # fmt: skip
        b_d_key, b_d_value = warpgroup_mma_wait(0, deps=[b_d_key, b_d_value])
        mbarrier.arrive(free.index(i_tile % STAGES), count=1)
    # Values are read no more: their place serves to store whole rows.
    s_store = s_value.index(I_HALF)
    _store_keys(p_d_value, s_store, b_d_value, n_own, n_key_stop, i_kv, K, D)
    _store_keys(p_d_key, s_store, b_d_key * (scale / LOG2_E), n_own, n_key_stop, i_kv, K, D)


@gluon.jit
def _start_scores(
    b_key, b_value, s_query, s_d_out, full, i_tile, m_there, SCORES: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Start a tile's scores and the gradients of its weights, (HALF, BLOCK_M) each; not to be used unless m_there."""
    i_slot = i_tile % STAGES
    b_none = gl.zeros([HALF, BLOCK_M], gl.float32, SCORES)
    mbarrier.wait(full.index(i_slot), i_tile // STAGES & 1, pred=m_there)
    b_scores = warpgroup_mma(b_key, s_query.index(i_slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
    b_d_weight = warpgroup_mma(b_value, s_d_out.index(i_slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
    return b_scores, b_d_weight


@gluon.jit
def _add_ahead(
    b_scores, b_d_weight, b_d_key, b_d_value, b_key, b_value, s_query, s_d_out, s_lse, s_delta, full, free, i_tile,
    n_tiles, o_key, n_row, n_row_stop, scale, G: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    SCORES: gl.constexpr, SUMS: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Add one tile of rows to dK (unscaled) and dV. Its scores are there and the gradients of its weights on their way,
    as the next tile's are afterwards.

    ptxas follows products on their way into the next turn of a loop only so far: their operands in registers may not
    change, and what reads a result comes after a wait for all of them.
    """
    TYPE: gl.constexpr = s_query.dtype
    i_slot = i_tile % STAGES
    b_lse = s_lse.index(i_slot).load(gl.SliceLayout(0, SCORES))
    b_weight = gl.exp2(b_scores * scale - b_lse[None, :])
    if CAUSAL:
        o_row = n_row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, SCORES))
        m_read = (o_key[:, None] <= (o_row // G)[None, :]) & (o_row < n_row_stop)[None, :]
        b_weight = gl.where(m_read, b_weight, 0.0)
    b_d_weight = warpgroup_mma_wait(0, deps=[b_d_weight])
    b_left = gl.convert_layout(b_weight.to(TYPE), gl.DotOperandLayout(0, SUMS, 2))
    b_d_value = warpgroup_mma(b_left, s_d_out.index(i_slot), b_d_value, is_async=True)
    b_delta = s_delta.index(i_slot).load(gl.SliceLayout(0, SCORES))
    b_d_scores = (b_weight * (b_d_weight - b_delta[None, :])).to(TYPE)
    b_left = gl.convert_layout(b_d_scores, gl.DotOperandLayout(0, SUMS, 2))
    b_d_key = warpgroup_mma(b_left, s_query.index(i_slot), b_d_key, is_async=True)
    b_scores, b_d_weight = _start_scores(
        b_key, b_value, s_query, s_d_out, full, i_tile + 1, i_tile + 1 < n_tiles, SCORES, BLOCK_M, STAGES
    )
    b_scores, b_d_key, b_d_value = warpgroup_mma_wait(1, deps=[b_scores, b_d_key, b_d_value])
    mbarrier.arrive(free.index(i_slot), count=1)
    return b_scores, b_d_weight, b_d_key, b_d_value


@gluon.jit
def sum_ahead(
    p_d_key, p_d_value, s_key, s_value, s_query, s_d_out, s_lse, s_delta, keys_full, full, free, n_key, n_key_stop,
    n_list, n_tiles, n_row_stop, i_kv, K, scale, LOG2_E: gl.constexpr, I_HALF: gl.constexpr, G: gl.constexpr,
    D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: dK and dV of half of the keys."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    KEYS: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    n_own = n_key + I_HALF * HALF
    o_key = n_own + gl.arange(0, HALF, gl.SliceLayout(1, SCORES))
    b_d_key = gl.zeros([HALF, D], gl.float32, SUMS)
    b_d_value = gl.zeros([HALF, D], gl.float32, SUMS)
    mbarrier.wait(keys_full.index(0), 0)
    b_key, b_value = s_key.index(I_HALF).load(KEYS), s_value.index(I_HALF).load(KEYS)
    b_scores, b_d_weight = _start_scores(b_key, b_value, s_query, s_d_out, full, 0, True, SCORES, BLOCK_M, STAGES)
    b_scores = warpgroup_mma_wait(1, deps=[b_scores])
    for i_tile in range(n_list):
        b_scores, b_d_weight, b_d_key, b_d_value = _add_ahead(
            b_scores, b_d_weight, b_d_key, b_d_value, b_key, b_value, s_query, s_d_out, s_lse, s_delta, full, free,
            i_tile, n_tiles, o_key, 0, n_row_stop, scale, G, BLOCK_M, STAGES, SCORES, SUMS, False,
        )  # fmt: skip
    for i_tile in range(n_list, n_tiles):
        n_row = n_key * G + (i_tile - n_list) * BLOCK_M
        b_scores, b_d_weight, b_d_key, b_d_value = _add_ahead(
            b_scores, b_d_weight, b_d_key, b_d_value, b_key, b_value, s_query, s_d_out, s_lse, s_delta, full, free,
            i_tile, n_tiles, o_key, n_row, n_row_stop, scale, G, BLOCK_M, STAGES, SCORES, SUMS, True,
        )  # fmt: skip
    warpgroup_mma_wait(0, deps=[b_d_weight])
    # Values are read no more: their place serves to store whole rows.
    s_store = s_value.index(I_HALF)
    _store_keys(p_d_value, s_store, b_d_value, n_own, n_key_stop, i_kv, K, D)
    _store_keys(p_d_key, s_store, b_d_key * (scale / LOG2_E), n_own, n_key_stop, i_kv, K, D)
