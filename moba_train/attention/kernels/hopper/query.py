"""``routed_query`` on Hopper.

A program owns 2 x 64 entries of one (kv head, block) list. Four warps have the copy engine bring the block's keys and
values, two warpgroups own 64 entries each and sum their dQ. Going from tile to tile as in ``forward`` gains nothing: of
queries and gradients only one tile has room, and the next one's would arrive as late.

Work and bytes are those of the Triton kernel.
"""

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moba_train.attention.kernels.hopper.shared import (
    HALF,
    barriers,
    copy_tile,
    described,
    find_tile,
    load_entries,
    load_rows,
)
from moba_train.attention.kernels.plan import Config, Sizes
from moba_train.attention.kernels.rows import LOG2_E, NUMBERS

# By head_dim; at 64 Triton's kernel is the faster one.
TILINGS = {128: Config(rows=128, keys=128, warps=4, stages=2)}


@gluon.jit
def _bring_keys(
    d_key, d_value, s_key, s_value, key_full, value_full, key_free, value_free, n_token, i_column, B: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warps: a block's tiles of keys and values, each as soon as its buffer is free."""
    for i_tile in range(B // BLOCK_N):
        i_slot = i_tile % STAGES
        i_phase = (i_tile // STAGES & 1) ^ 1
        n_key = n_token + i_tile * BLOCK_N
        mbarrier.wait(key_free.index(i_slot), i_phase)
        mbarrier.expect(key_full.index(i_slot), d_key.block_type.nbytes)
        copy_tile(d_key, [n_key, i_column], key_full.index(i_slot), s_key.index(i_slot))
        mbarrier.wait(value_free.index(i_slot), i_phase)
        mbarrier.expect(value_full.index(i_slot), d_value.block_type.nbytes)
        copy_tile(d_value, [n_key, i_column], value_full.index(i_slot), s_value.index(i_slot))


@gluon.jit
def _sum_query(
    p_query, p_d_out, p_lse, p_delta, p_entries, p_partial, s_query, s_d_out, s_key, s_value, key_full, value_full,
    key_free, value_free, scale, n_start, n_stop, i_kv, o_lse, K, o_result, LOG2_E: gl.constexpr, G: gl.constexpr,
    R: gl.constexpr, B: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: HALF entries from n_start on; past n_stop they repeat the last one, and are not stored."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    TYPE: gl.constexpr = p_query.dtype.element_ty
    o_entry, _ = load_entries(p_entries, n_start, n_stop, gl.SliceLayout(1, ROWS))
    load_rows(p_query, o_entry // R, i_kv, s_query, K, G, D, ROWS)
    load_rows(p_d_out, o_entry // R, i_kv, s_d_out, K, G, D, ROWS)
    fence_async_shared()
    o_entry, _ = load_entries(p_entries, n_start, n_stop, gl.SliceLayout(1, SCORES))
    b_lse = gl.load(p_lse + (o_lse + o_entry // R))
    b_delta = gl.load(p_delta + (o_lse + o_entry // R))

    b_none = gl.zeros([HALF, BLOCK_N], gl.float32, SCORES)
    b_d_query = gl.zeros([HALF, D], gl.float32, SUMS)
    mbarrier.wait(key_full.index(0), 0)
    for i_tile in range(B // BLOCK_N):
        i_slot = i_tile % STAGES
        b_scores = warpgroup_mma(s_query, s_key.index(i_slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
        mbarrier.wait(value_full.index(i_slot), i_tile // STAGES & 1)
        b_d_weight = warpgroup_mma(s_d_out, s_value.index(i_slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
        b_scores = warpgroup_mma_wait(1, deps=[b_scores])
        b_weight = gl.exp2(b_scores * scale - b_lse[:, None])
        # Here and not at the loop's head: a wait is a branch, behind which ptxas may not move the exponentials.
        i_next = i_tile + 1
        mbarrier.wait(key_full.index(i_next % STAGES), i_next // STAGES & 1, pred=i_next < B // BLOCK_N)
        b_d_weight = warpgroup_mma_wait(0, deps=[b_d_weight])
        mbarrier.arrive(value_free.index(i_slot), count=1)
        b_d_scores = (b_weight * (b_d_weight - b_delta[:, None])).to(TYPE)
        b_left = gl.convert_layout(b_d_scores, gl.DotOperandLayout(0, SUMS, 2))
        b_d_query = warpgroup_mma(b_left, s_key.index(i_slot), b_d_query, is_async=True)
        b_d_query = warpgroup_mma_wait(0, deps=[b_d_query])
        mbarrier.arrive(key_free.index(i_slot), count=1)

    b_d_query = b_d_query * (scale / LOG2_E)
    # The queries are read no more: their place serves to store whole rows.
    s_query.store(b_d_query.to(TYPE))
    o_entry, m_row = load_entries(p_entries, n_start, n_stop, gl.SliceLayout(1, ROWS))
    o_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    p_rows = p_partial + ((o_result + o_entry) * D)[:, None] + o_d[None, :]
    gl.store(p_rows, s_query.load(ROWS), mask=m_row[:, None])


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
    if gl.load(p_lists + gl.program_id(0)) == LISTS:
        return
    i_list, n_start, n_stop = find_tile(p_lists, p_of_list, p_offsets, gl.program_id(0), N, P, i_part, n_parts, 2)
    n_token = gl.load(p_bounds + i_list % N)
    i_kv = i_kv_start + i_list // N
    o_lse = i_kv.to(gl.int64) * W
    o_result = (i_list // N).to(gl.int64) * n_entries - i_entry_start

    TYPE: gl.constexpr = p_query.dtype.element_ty
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, D], TYPE)
    s_query = gl.allocate_shared_memory(TYPE, [2, HALF, D], ROWS)
    s_d_out = gl.allocate_shared_memory(TYPE, [2, HALF, D], ROWS)
    s_key = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_N, D], d_key.layout)
    s_value = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_N, D], d_value.layout)
    key_full, value_full, key_free, value_free = (
        barriers(1, STAGES), barriers(1, STAGES), barriers(2, STAGES), barriers(2, STAGES)
    )  # fmt: skip
    fence_async_shared()
    gl.warp_specialize(
        [
            (_sum_query, (
                p_query, p_d_out, p_lse, p_delta, p_entries, p_partial, s_query.index(0), s_d_out.index(0), s_key,
                s_value, key_full, value_full, key_free, value_free, scale, n_start, n_stop, i_kv, o_lse, K, o_result,
                LOG2_E, G, R, B, D, BLOCK_N, STAGES,
            )),
            (_sum_query, (
                p_query, p_d_out, p_lse, p_delta, p_entries, p_partial, s_query.index(1), s_d_out.index(1), s_key,
                s_value, key_full, value_full, key_free, value_free, scale, n_start + HALF, n_stop, i_kv, o_lse, K,
                o_result, LOG2_E, G, R, B, D, BLOCK_N, STAGES,
            )),
            (_bring_keys, (
                d_key, d_value, s_key, s_value, key_full, value_full, key_free, value_free, n_token, i_kv * D, B,
                BLOCK_N, STAGES,
            )),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip


def launch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any, tiles: int, sizes: Sizes
) -> None:
    """``arguments``: those of the kernel from the output's gradient on. ``tiles``: at most."""
    tiling = TILINGS[sizes.head_dim]
    routed_query_hopper_kernel[(tiles,)](
        described(key, tiling.keys), described(value, tiling.keys), query, *arguments, LOG2_E=LOG2_E, G=sizes.group,
        R=sizes.choose, B=sizes.block_size, D=sizes.head_dim, BLOCK_N=tiling.keys, STAGES=tiling.stages,
        num_warps=tiling.warps,
    )  # fmt: skip
