"""``key_value`` on Hopper.

A program owns 128 keys of one block and kv head. Four warps gather rows and their gradients into shared memory, BLOCK_M
at a time, STAGES tiles ahead. Two warpgroups own 64 keys each: the weights, (keys, rows), stay in registers, where the
products that sum dV and dK read them; while the tensor cores are at one product, a warpgroup makes the other's operand.
With QUERY, for blocks of 128 keys, the warpgroups exchange the gradients of their scores through shared memory, and
each multiplies them with half of the keys' columns: the entries' partial dQ.

Work and bytes are those of the Triton kernel.
"""

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moba_train.attention.kernels.hopper.shared import HALF, barriers, copy_tile, described, gather
from moba_train.attention.kernels.plan import Config, Sizes
from moba_train.attention.kernels.rows import LOG2_E, NUMBERS

TILINGS = {128: Config(rows=64, keys=128, warps=4, stages=3)}  # by head_dim; at 64 Triton's kernel is as fast


@gluon.jit
def _gather_rows(
    d_key, d_value, p_query, p_d_out, p_lse, p_delta, p_padded_row, p_padded_lse, p_padded_delta, s_key, s_value,
    s_query, s_d_out, s_lse, s_delta, keys_full, full, free, n_key, i_start, n_list, n_tiles, n_row_stop, i_kv, o_lse,
    K, G: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warps: keys and values, then the tiles of the list and of the own block, as buffers become free."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    VECTOR: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.expect(keys_full.index(0), 4 * d_key.block_type.nbytes)
    for i_half in gl.static_range(2):
        copy_tile(d_key, [n_key + i_half * HALF, i_kv * D], keys_full.index(0), s_key.index(i_half))
        copy_tile(d_value, [n_key + i_half * HALF, i_kv * D], keys_full.index(0), s_value.index(i_half))
    o_m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, ROWS))
    o_v = gl.arange(0, BLOCK_M, VECTOR)
    o_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    p_list = p_padded_row + i_start * BLOCK_M + o_m
    # Rows are read a tile ahead: their addresses are there in time.
    o_ahead = gl.load(p_list, mask=(n_list > 0) & (o_m >= 0), other=0)
    for i_tile in range(n_tiles):
        i_slot = i_tile % STAGES
        n_row = n_key * G + (i_tile - n_list) * BLOCK_M
        o_own = gl.minimum(n_row + o_m, n_row_stop - 1)
        o_row = gl.where(i_tile < n_list, o_ahead, o_own // G * K * G + i_kv * G + o_own % G).to(gl.int64) * D
        o_ahead = gl.load(p_list + (i_tile + 1) * BLOCK_M, mask=(i_tile + 1 < n_list) & (o_m >= 0), other=0)
        mbarrier.wait(free.index(i_slot), (i_tile // STAGES & 1) ^ 1)
        gather(s_query.index(i_slot), p_query + (o_row[:, None] + o_d[None, :]))
        gather(s_d_out.index(i_slot), p_d_out + (o_row[:, None] + o_d[None, :]))
        if i_tile < n_list:
            o_list = (i_start + i_tile) * BLOCK_M + o_v
            gather(s_lse.index(i_slot), p_padded_lse + o_list)
            gather(s_delta.index(i_slot), p_padded_delta + o_list)
        else:
            o_rows = o_lse + gl.minimum(n_row + o_v, n_row_stop - 1)
            gather(s_lse.index(i_slot), p_lse + o_rows)
            gather(s_delta.index(i_slot), p_delta + o_rows)
        async_copy.commit_group()
        async_copy.wait_group(1)
        fence_async_shared()
        mbarrier.arrive(full.index((i_tile + STAGES - 1) % STAGES), count=1, pred=i_tile > 0)
    async_copy.wait_group(0)
    fence_async_shared()
    mbarrier.arrive(full.index((n_tiles + STAGES - 1) % STAGES), count=1)


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
def _sum_gradients(
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
    for i_tile in range(n_list, n_tiles):
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
def _store_keys(p_base, s_store, b_sums, n_own, n_key_stop, i_kv, K, D: gl.constexpr):
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    s_store.store(b_sums.to(s_store.dtype))
    o_key = n_own + gl.arange(0, HALF, gl.SliceLayout(1, ROWS))
    o_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    p_rows = p_base + ((o_key.to(gl.int64) * K + i_kv) * D)[:, None] + o_d[None, :]
    gl.store(p_rows, s_store.load(ROWS), mask=(o_key < n_key_stop)[:, None])


@gluon.jit(do_not_specialize=NUMBERS)
def key_value_hopper_kernel(
    d_key,
    d_value,
    p_query,
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
    LOG2_E: gl.constexpr,
    QUERY: gl.constexpr,
    G: gl.constexpr,
    R: gl.constexpr,
    TILES: gl.constexpr,
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    # The order of the programs is that of ``backward.key_value_kernel``, for its reasons.
    i_tile = gl.program_id(0) % TILES
    i_part_kv = gl.program_id(0) // TILES % n_kv
    i_block = gl.program_id(0) // TILES // n_kv
    i_kv = i_kv_start + i_part_kv
    n_key = gl.load(p_bounds + i_block) + i_tile * (2 * HALF)
    n_key_stop = gl.load(p_bounds + i_block + 1)
    if n_key >= n_key_stop:
        return
    i_start, n_list = n_key * 0, n_key * 0
    if R > 0:
        i_start = gl.load(p_of_list + i_part_kv * N + i_block)
        n_list = gl.load(p_of_list + i_part_kv * N + i_block + 1) - i_start
    n_row_stop = n_key_stop * G
    n_tiles = n_list + (n_row_stop - n_key * G + BLOCK_M - 1) // BLOCK_M
    o_partial = i_part_kv.to(gl.int64) * W * R

    TYPE: gl.constexpr = p_query.dtype.element_ty
    WIDE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, D], TYPE)
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, D], TYPE)
    NARROW: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, BLOCK_M], TYPE)
    NUMBER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_key = gl.allocate_shared_memory(TYPE, [2, HALF, D], WIDE)
    s_value = gl.allocate_shared_memory(TYPE, [2, HALF, D], WIDE)
    s_query = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_M, D], ROWS)
    s_d_out = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_M, D], ROWS)
    s_lse = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], NUMBER)
    s_delta = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], NUMBER)
    keys_full, full, free = barriers(1, 1), barriers(1, STAGES), barriers(2, STAGES)
    if QUERY:
        s_exchange = gl.allocate_shared_memory(TYPE, [4, HALF, BLOCK_M], NARROW)
        s_d_query = gl.allocate_shared_memory(TYPE, [2, BLOCK_M, D // 2], NARROW)
        exchanged = barriers(2, 1)
    else:  # Not used: a barrier here would share its bytes with what warp_specialize hands over, and spoil it.
        s_exchange, s_d_query, exchanged = s_query, s_query, keys_full
    fence_async_shared()
    gl.warp_specialize(
        [
            (_sum_gradients, (
                p_padded, p_partial, p_d_key, p_d_value, s_key, s_value, s_query, s_d_out, s_lse, s_delta, s_exchange,
                s_d_query, keys_full, full, free, exchanged, n_key, n_key_stop, i_start, n_list, n_tiles, n_row_stop,
                i_kv, o_partial, K, scale, LOG2_E, 0, QUERY, G, D, BLOCK_M, STAGES,
            )),
            (_sum_gradients, (
                p_padded, p_partial, p_d_key, p_d_value, s_key, s_value, s_query, s_d_out, s_lse, s_delta, s_exchange,
                s_d_query, keys_full, full, free, exchanged, n_key, n_key_stop, i_start, n_list, n_tiles, n_row_stop,
                i_kv, o_partial, K, scale, LOG2_E, 1, QUERY, G, D, BLOCK_M, STAGES,
            )),
            (_gather_rows, (
                d_key, d_value, p_query, p_d_out, p_lse, p_delta, p_padded_row, p_padded_lse, p_padded_delta, s_key,
                s_value, s_query, s_d_out, s_lse, s_delta, keys_full, full, free, n_key, i_start, n_list, n_tiles,
                n_row_stop, i_kv, i_kv.to(gl.int64) * W, K, G, D, BLOCK_M, STAGES,
            )),
        ],
        [4, 4],
        [232, 40],
    )  # fmt: skip


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *arguments: Any,
    programs: int,
    sizes: Sizes,
    entries: bool,
) -> None:
    """``arguments``: those of the kernel from the output's gradient on. ``entries``: the partial dQ too."""
    tiling = TILINGS[sizes.head_dim]
    key_value_hopper_kernel[(programs,)](
        described(key, HALF.value), described(value, HALF.value), query, *arguments, LOG2_E=LOG2_E, QUERY=entries,
        G=sizes.group, R=sizes.choose, TILES=-(-sizes.block_size // tiling.keys), D=sizes.head_dim, BLOCK_M=tiling.rows,
        STAGES=tiling.stages, num_warps=tiling.warps,
    )  # fmt: skip
