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
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from moba_train.attention.kernels.hopper.key_value_sums import sum_ahead, sum_gradients
from moba_train.attention.kernels.hopper.shared import HALF, barriers, copy_tile, described, gather, thread_barrier
from moba_train.attention.kernels.plan import Config, Sizes
from moba_train.attention.kernels.rows import LOG2_E, NUMBERS

# By head_dim.
TILINGS = {64: Config(rows=64, keys=128, warps=4, stages=4), 128: Config(rows=64, keys=128, warps=4, stages=3)}


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
        thread_barrier()  # all of the warps' copies are fenced
        mbarrier.arrive(full.index((i_tile + STAGES - 1) % STAGES), count=1, pred=i_tile > 0)
    async_copy.wait_group(0)
    fence_async_shared()
    thread_barrier()
    mbarrier.arrive(full.index((n_tiles + STAGES - 1) % STAGES), count=1)


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
    AHEAD: gl.constexpr,
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
    if AHEAD:
        gl.warp_specialize(
            [
                (sum_ahead, (
                    p_d_key, p_d_value, s_key, s_value, s_query, s_d_out, s_lse, s_delta, keys_full, full, free, n_key,
                    n_key_stop, n_list, n_tiles, n_row_stop, i_kv, K, scale, LOG2_E, 0, G, D, BLOCK_M, STAGES,
                )),
                (sum_ahead, (
                    p_d_key, p_d_value, s_key, s_value, s_query, s_d_out, s_lse, s_delta, keys_full, full, free, n_key,
                    n_key_stop, n_list, n_tiles, n_row_stop, i_kv, K, scale, LOG2_E, 1, G, D, BLOCK_M, STAGES,
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
    else:
        gl.warp_specialize(
            [
                (sum_gradients, (
                    p_padded, p_partial, p_d_key, p_d_value, s_key, s_value, s_query, s_d_out, s_lse, s_delta,
                    s_exchange, s_d_query, keys_full, full, free, exchanged, n_key, n_key_stop, i_start, n_list,
                    n_tiles, n_row_stop, i_kv, o_partial, K, scale, LOG2_E, 0, QUERY, G, D, BLOCK_M, STAGES,
                )),
                (sum_gradients, (
                    p_padded, p_partial, p_d_key, p_d_value, s_key, s_value, s_query, s_d_out, s_lse, s_delta,
                    s_exchange, s_d_query, keys_full, full, free, exchanged, n_key, n_key_stop, i_start, n_list,
                    n_tiles, n_row_stop, i_kv, o_partial, K, scale, LOG2_E, 1, QUERY, G, D, BLOCK_M, STAGES,
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


def serves(sizes: Sizes, entries: bool) -> bool:
    """Whether these kernels are the faster ones; ``entries``: with the partial dQ."""
    return sizes.head_dim == 128 or not entries


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
        AHEAD=sizes.head_dim == 64, G=sizes.group, R=sizes.choose, TILES=-(-sizes.block_size // tiling.keys),
        D=sizes.head_dim, BLOCK_M=tiling.rows, STAGES=tiling.stages, num_warps=tiling.warps,
    )  # fmt: skip
