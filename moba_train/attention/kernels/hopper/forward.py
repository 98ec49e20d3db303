"""``routed_forward`` on Hopper.

A program owns 2 x 64 entries of one (kv head, block) list. Four warps have the copy engine bring the block's keys and
values, BLOCK_N at a time. Two warpgroups own 64 entries each: while the tensor cores multiply one tile's weights with
its values, a warpgroup is at the softmax of the next tile's scores.

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
    described,
    find_tile,
    load_entries,
    load_rows,
    load_tiles,
    store_entries,
)
from moba_train.attention.kernels.plan import Config, Sizes
from moba_train.attention.kernels.rows import NUMBERS

TILING = Config(rows=128, keys=128, warps=4, stages=2)
HEAD_DIMS = (64, 128)


@gluon.jit
def _attend(
    p_query, p_entries, p_partial, p_partial_lse, s_query, s_key, s_value, key_full, value_full, key_free, value_free,
    scale, n_start, n_stop, i_kv, K, o_result, G: gl.constexpr, R: gl.constexpr, B: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: HALF entries from n_start on; past n_stop they repeat the last one, and are not stored."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    TYPE: gl.constexpr = p_query.dtype.element_ty
    o_entry, _ = load_entries(p_entries, n_start, n_stop, gl.SliceLayout(1, ROWS))
    load_rows(p_query, o_entry // R, i_kv, s_query, K, G, D, ROWS)
    fence_async_shared()

    b_none = gl.zeros([HALF, BLOCK_N], gl.float32, SCORES)
    b_out = gl.zeros([HALF, D], gl.float32, OUT)
    mbarrier.wait(key_full.index(0), 0)
    b_scores = warpgroup_mma(s_query, s_key.index(0).permute((1, 0)), b_none, use_acc=False, is_async=True)
    b_scores = warpgroup_mma_wait(0, deps=[b_scores])
    mbarrier.arrive(key_free.index(0), count=1)
    b_max = gl.max(b_scores, 1) * scale
    b_weight = gl.exp2(b_scores * scale - b_max[:, None])
    b_sum = gl.sum(b_weight, 1)
    b_left = gl.convert_layout(b_weight.to(TYPE), WEIGHTS)
    mbarrier.wait(key_full.index(1 % STAGES), 1 // STAGES & 1, pred=B > BLOCK_N)
    for i_tile in range(1, B // BLOCK_N):
        i_slot = i_tile % STAGES
        i_before = (i_tile - 1) % STAGES
        b_scores = warpgroup_mma(s_query, s_key.index(i_slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
        mbarrier.wait(value_full.index(i_before), (i_tile - 1) // STAGES & 1)
        b_out = warpgroup_mma(b_left, s_value.index(i_before), b_out, is_async=True)
        b_scores = warpgroup_mma_wait(1, deps=[b_scores])
        mbarrier.arrive(key_free.index(i_slot), count=1)
        b_new = gl.maximum(b_max, gl.max(b_scores, 1) * scale)
        b_weight = gl.exp2(b_scores * scale - b_new[:, None])
        b_decay = gl.exp2(b_max - b_new)
        b_sum = b_sum * b_decay + gl.sum(b_weight, 1)
        b_max = b_new
        # Here and not at the loop's head: a wait is a branch, behind which ptxas may not move the exponentials.
        i_next = i_tile + 1
        mbarrier.wait(key_full.index(i_next % STAGES), i_next // STAGES & 1, pred=i_next < B // BLOCK_N)
        b_out = warpgroup_mma_wait(0, deps=[b_out])
        mbarrier.arrive(value_free.index(i_before), count=1)
        b_out = b_out * gl.convert_layout(b_decay, gl.SliceLayout(1, OUT))[:, None]
        b_left = gl.convert_layout(b_weight.to(TYPE), WEIGHTS)
    i_last: gl.constexpr = B // BLOCK_N - 1
    mbarrier.wait(value_full.index(i_last % STAGES), i_last // STAGES & 1)
    b_out = warpgroup_mma(b_left, s_value.index(i_last % STAGES), b_out, is_async=True)
    b_out = warpgroup_mma_wait(0, deps=[b_out])

    o_entry, m_row = load_entries(p_entries, n_start, n_stop, gl.SliceLayout(1, SCORES))
    gl.store(p_partial_lse + (o_result + o_entry), b_max + gl.log2(b_sum), mask=m_row)
    b_out = b_out / gl.convert_layout(b_sum, gl.SliceLayout(1, OUT))[:, None]
    store_entries(p_partial, p_entries, o_result, n_start, n_stop, s_query, b_out, D, ROWS)


@gluon.jit(do_not_specialize=NUMBERS)
def routed_forward_hopper_kernel(
    d_key,
    d_value,
    p_query,
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
    G: gl.constexpr,
    R: gl.constexpr,
    B: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    i_list, n_start, n_stop, n_token = find_tile(p_lists, p_of_list, p_offsets, p_bounds, LISTS, N, P, i_part, n_parts)
    if i_list == LISTS:
        return
    i_kv = i_kv_start + i_list // N
    o_result = (i_list // N).to(gl.int64) * n_entries - i_entry_start

    TYPE: gl.constexpr = p_query.dtype.element_ty
    s_query = gl.allocate_shared_memory(TYPE, [2, HALF, D], gl.NVMMASharedLayout.get_default_for([HALF, D], TYPE))
    s_key = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_N, D], d_key.layout)
    s_value = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_N, D], d_value.layout)
    key_full, value_full, key_free, value_free = (
        barriers(1, STAGES), barriers(1, STAGES), barriers(2, STAGES), barriers(2, STAGES)
    )  # fmt: skip
    fence_async_shared()
    gl.warp_specialize(
        [
            (_attend, (
                p_query, p_entries, p_partial, p_partial_lse, s_query.index(0), s_key, s_value, key_full, value_full,
                key_free, value_free, scale, n_start, n_stop, i_kv, K, o_result, G, R, B, D, BLOCK_N, STAGES,
            )),
            (_attend, (
                p_query, p_entries, p_partial, p_partial_lse, s_query.index(1), s_key, s_value, key_full, value_full,
                key_free, value_free, scale, n_start + HALF, n_stop, i_kv, K, o_result, G, R, B, D, BLOCK_N, STAGES,
            )),
            (load_tiles, (
                d_key, d_value, s_key, s_value, key_full, value_full, key_free, value_free, n_token, i_kv * D, B,
                BLOCK_N, STAGES,
            )),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip


def launch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any, programs: int, sizes: Sizes
) -> None:
    """``arguments``: those of the kernel from the blocks' bounds on."""
    routed_forward_hopper_kernel[(programs,)](
        described(key, TILING.keys), described(value, TILING.keys), query, *arguments, G=sizes.group, R=sizes.choose,
        B=sizes.block_size, D=sizes.head_dim, BLOCK_N=TILING.keys, STAGES=TILING.stages, num_warps=TILING.warps,
    )  # fmt: skip
