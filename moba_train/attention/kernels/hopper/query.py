"""``routed_query`` on Hopper.

Programs are as many as multiprocessors; each goes from tile to tile, 2 x 64 entries of a (kv head, block) list. One
warp has the copy engine bring the block's keys and values, two warpgroups own 64 entries each and sum their dQ. Two
warps gather the next tile's queries while this one is attended to, and its gradients, of which only one tile has room,
while its last product is made and stored.

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

from moba_train.attention.kernels.hopper import query_narrow, query_short
from moba_train.attention.kernels.hopper.query_loads import all_places, bring_keys, gather_half, gather_queries
from moba_train.attention.kernels.hopper.shared import (
    HALF,
    barriers,
    described,
    programs,
    thread_barrier,
)
from moba_train.attention.kernels.plan import Config, Sizes
from moba_train.attention.kernels.rows import LOG2_E, NUMBERS

SHORT_BLOCK = 1024  # keys up to which ``query_short`` is faster: by 10 % at 512, 2 % at 1024, slower by 8 % at 2048
# By head_dim. At 64 it is ``query_narrow``.
TILINGS = {64: query_narrow.TILING, 128: Config(rows=128, keys=128, warps=4, stages=2)}


@gluon.jit
def _gather_rows(
    p_query, p_d_out, p_lists, p_of_list, p_offsets, p_entries, s_query, s_d_out, s_place, rows_full, rows_free,
    grads_full, grads_free, i_kv_start, i_entry_start, n_entries, n_tiles, N, P, i_part, n_parts, K,
    G: gl.constexpr, R: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """The gathering warps: a tile's queries and gradients, and the places of its results, past the list's end less
    than 0."""
    i_turn = i_kv_start * 0
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        i_kv, o_result = gather_queries(
            p_query, p_lists, p_of_list, p_offsets, p_entries, s_query, s_place, rows_full, rows_free, i_tile, i_turn,
            i_kv_start, i_entry_start, n_entries, N, P, i_part, n_parts, K, G, R, D,
        )  # fmt: skip
        i_buffer = i_turn % 2 * 2
        mbarrier.wait(grads_free.index(0), (i_turn & 1) ^ 1)
        for i_own in gl.static_range(2):
            gather_half(p_d_out, s_place.index(i_buffer + i_own), s_d_out.index(i_own), i_kv, o_result, K, G, R, D)
        async_copy.wait_group(0)
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(grads_full.index(0), count=1)
        i_turn += 1


@gluon.jit
def _load_sums(
    p_lse, p_delta, s_place, m_there, i_kv_start, i_entry_start, n_entries, W, R: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """Log-sum-exps and deltas of a tile's entries, found by the places of their results."""
    o_place = all_places(s_place, LAYOUT)
    i_part_kv = o_place // n_entries
    o_row = (i_kv_start + i_part_kv).to(gl.int64) * W + (o_place - i_part_kv * n_entries + i_entry_start) // R
    b_lse = gl.load(p_lse + o_row, mask=m_there & (o_place >= 0), other=0.0)
    return b_lse, gl.load(p_delta + o_row, mask=m_there & (o_place >= 0), other=0.0)


@gluon.jit
def _sum_query(
    p_lse, p_delta, p_partial, s_query, s_d_out, s_place, s_key, s_value, key_full, value_full, key_free, value_free,
    rows_full, rows_free, grads_full, grads_free, scale, i_kv_start, i_entry_start, n_entries, n_tiles, W,
    I_OWN: gl.constexpr, LOG2_E: gl.constexpr, R: gl.constexpr, B: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: HALF entries of each tile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    NUMBERS: gl.constexpr = gl.SliceLayout(1, SCORES)
    TYPE: gl.constexpr = s_query.dtype
    b_none = gl.zeros([HALF, BLOCK_N], gl.float32, SCORES)
    o_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    i_item, i_turn = n_tiles * 0, n_tiles * 0
    m_first = gl.program_id(0) < n_tiles
    mbarrier.wait(rows_full.index(0), 0, pred=m_first)
    b_lse, b_delta = _load_sums(
        p_lse, p_delta, s_place.index(I_OWN), m_first, i_kv_start, i_entry_start, n_entries, W, R, NUMBERS
    )
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        i_rows = i_turn % 2 * 2 + I_OWN
        s_rows, s_grads = s_query.index(i_rows), s_d_out.index(I_OWN)
        b_d_query = gl.zeros([HALF, D], gl.float32, SUMS)
        mbarrier.wait(key_full.index(i_item % STAGES), i_item // STAGES & 1)
        for n_key in range(0, B, BLOCK_N):
            i_slot = i_item % STAGES
            i_phase = i_item // STAGES & 1
            b_scores = warpgroup_mma(s_rows, s_key.index(i_slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
            mbarrier.wait(grads_full.index(0), i_turn & 1, pred=n_key == 0)
            mbarrier.wait(value_full.index(i_slot), i_phase)
            b_d_weight = warpgroup_mma(
                s_grads, s_value.index(i_slot).permute((1, 0)), b_none, use_acc=False, is_async=True
            )
            b_scores = warpgroup_mma_wait(1, deps=[b_scores])
            b_weight = gl.exp2(b_scores * scale - b_lse[:, None])
            # Here and not at the loop's head: a wait is a branch, behind which ptxas may not move the exponentials.
            i_next = i_item + 1
            mbarrier.wait(key_full.index(i_next % STAGES), i_next // STAGES & 1, pred=n_key + BLOCK_N < B)
            b_d_weight = warpgroup_mma_wait(0, deps=[b_d_weight])
            mbarrier.arrive(value_free.index(i_slot), count=1)
            mbarrier.arrive(grads_free.index(0), count=1, pred=n_key + BLOCK_N >= B)
            b_d_scores = (b_weight * (b_d_weight - b_delta[:, None])).to(TYPE)
            b_left = gl.convert_layout(b_d_scores, gl.DotOperandLayout(0, SUMS, 2))
            b_d_query = warpgroup_mma(b_left, s_key.index(i_slot), b_d_query, is_async=True)
            b_d_query = warpgroup_mma_wait(0, deps=[b_d_query])
            mbarrier.arrive(key_free.index(i_slot), count=1)
            i_item += 1
        # The next tile's numbers come while this one's results go.
        m_next = i_tile + gl.num_programs(0) < n_tiles
        i_next_turn = i_turn + 1
        mbarrier.wait(rows_full.index(i_next_turn % 2), i_next_turn // 2 & 1, pred=m_next)
        b_lse, b_delta = _load_sums(
            p_lse, p_delta, s_place.index(i_next_turn % 2 * 2 + I_OWN), m_next, i_kv_start, i_entry_start, n_entries, W,
            R, NUMBERS,
        )  # fmt: skip
        # The queries are read no more: their place serves to store whole rows.
        s_rows.store((b_d_query * (scale / LOG2_E)).to(TYPE))
        o_place = s_place.index(i_rows).load(gl.SliceLayout(1, ROWS))
        p_rows = p_partial + (o_place.to(gl.int64) * D)[:, None] + o_d[None, :]
        gl.store(p_rows, s_rows.load(ROWS), mask=(o_place >= 0)[:, None])
        mbarrier.arrive(rows_free.index(i_turn % 2), count=1)
        i_turn += 1


@gluon.jit(do_not_specialize=NUMBERS)
def routed_query_hopper_kernel(
    d_key,
    d_value,
    p_query,
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
    LOG2_E: gl.constexpr,
    G: gl.constexpr,
    R: gl.constexpr,
    B: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    n_tiles = gl.load(p_of_list + LISTS)
    TYPE: gl.constexpr = p_query.dtype.element_ty
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, D], TYPE)
    NUMBER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_query = gl.allocate_shared_memory(TYPE, [4, HALF, D], ROWS)
    s_d_out = gl.allocate_shared_memory(TYPE, [2, HALF, D], ROWS)
    s_place = gl.allocate_shared_memory(gl.int32, [4, HALF], NUMBER)
    s_key = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_N, D], d_key.layout)
    s_value = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_N, D], d_value.layout)
    key_full, value_full, key_free, value_free = (
        barriers(1, STAGES), barriers(1, STAGES), barriers(2, STAGES), barriers(2, STAGES)
    )  # fmt: skip
    rows_full, rows_free, grads_full, grads_free = barriers(1, 2), barriers(2, 2), barriers(1, 1), barriers(2, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_sum_query, (
                p_lse, p_delta, p_partial, s_query, s_d_out, s_place, s_key, s_value, key_full, value_full, key_free,
                value_free, rows_full, rows_free, grads_full, grads_free, scale, i_kv_start, i_entry_start, n_entries,
                n_tiles, W, 0, LOG2_E, R, B, D, BLOCK_N, STAGES,
            )),
            (_sum_query, (
                p_lse, p_delta, p_partial, s_query, s_d_out, s_place, s_key, s_value, key_full, value_full, key_free,
                value_free, rows_full, rows_free, grads_full, grads_free, scale, i_kv_start, i_entry_start, n_entries,
                n_tiles, W, 1, LOG2_E, R, B, D, BLOCK_N, STAGES,
            )),
            (_gather_rows, (
                p_query, p_d_out, p_lists, p_of_list, p_offsets, p_entries, s_query, s_d_out, s_place, rows_full,
                rows_free, grads_full, grads_free, i_kv_start, i_entry_start, n_entries, n_tiles, N, P, i_part, n_parts,
                K, G, R, D,
            )),
            (bring_keys, (
                d_key, d_value, p_lists, p_bounds, s_key, s_value, key_full, value_full, key_free, value_free,
                i_kv_start, n_tiles, N, B, D, BLOCK_N, STAGES,
            )),
        ],
        [4, 2, 1],
        [240, 32, 32],
    )  # fmt: skip


def launch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any, tiles: int, sizes: Sizes
) -> None:
    """``arguments``: those of the kernel from the output's gradient on. ``tiles``: at most."""
    tiling, kernel = TILINGS[sizes.head_dim], routed_query_hopper_kernel
    if sizes.head_dim == 64:
        kernel = query_narrow.routed_query_narrow_hopper_kernel
    elif sizes.block_size <= SHORT_BLOCK:
        tiling, kernel = query_short.TILING, query_short.routed_query_short_hopper_kernel
    kernel[(min(tiles, programs(query.device)),)](
        described(key, tiling.keys), described(value, tiling.keys), query, *arguments, LOG2_E=LOG2_E, G=sizes.group,
        R=sizes.choose, B=sizes.block_size, D=sizes.head_dim, BLOCK_N=tiling.keys, STAGES=tiling.stages,
        num_warps=tiling.warps,
    )  # fmt: skip
