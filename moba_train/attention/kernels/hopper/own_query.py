"""``merge_query`` on Hopper.

Programs, tiles and warps are those of ``own_forward``; the R partial dQ of a tile are added last, so that the next
tile's rows are gathered while they are.

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

from moba_train.attention.kernels.hopper import own_short
from moba_train.attention.kernels.hopper.own import (
    TILE_ROWS,
    bring_tiles,
    described_partial,
    described_rows,
    last_token,
    number,
    row_numbers,
    row_tile,
    whole_rows,
)
from moba_train.attention.kernels.hopper.shared import (
    HALF,
    barriers,
    copy_tile,
    described,
    mask_scores,
    programs,
)
from moba_train.attention.kernels.plan import Config, Sizes
from moba_train.attention.kernels.rows import LOG2_E, NUMBERS

SHORT_BLOCK = 1024  # keys up to which ``own_short`` is faster: by 11 % at 512, 8 % at 1024, slower by 3 % at 2048
# By head_dim. At 64 it is ``own_short``.
TILINGS = {64: own_short.TILING, 128: Config(rows=128, keys=128, warps=4, stages=4)}


@gluon.jit
def _bring_rows(
    d_query, d_d_out, p_lse, p_delta, p_bounds, p_first, p_of_token, s_query, s_d_out, s_lse, s_delta, s_begin,
    s_earlier, rows_full, rows_free, i_kv_start, i_row_start, n_row_tiles, n_tiles, T, G: gl.constexpr,
):  # fmt: skip
    """A tile's queries and gradients, and each row's numbers."""
    VECTOR: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])
    o_vector = gl.arange(0, TILE_ROWS, VECTOR)
    i_phase = i_kv_start * 0
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        i_part_kv, n_row = row_tile(i_tile, n_tiles, n_row_tiles, i_row_start)
        i_kv = i_kv_start + i_part_kv
        o_row = gl.minimum(n_row + o_vector, T * G - 1)
        b_begin, b_earlier, b_lse, b_delta = row_numbers(
            p_lse, p_delta, p_bounds, p_first, p_of_token, o_row, i_kv, T, G
        )
        mbarrier.wait(rows_free.index(0), i_phase ^ 1)
        mbarrier.expect(rows_full.index(0), 4 * d_query.block_type.nbytes)
        for i_half in gl.static_range(2):
            place = [(n_row + i_half * HALF) // G, i_kv * G, 0]
            copy_tile(d_query, place, rows_full.index(0), s_query.index(i_half))
            copy_tile(d_d_out, place, rows_full.index(0), s_d_out.index(i_half))
        s_begin.store(b_begin)
        s_earlier.store(b_earlier)
        s_lse.store(b_lse)
        s_delta.store(b_delta)
        mbarrier.arrive(rows_full.index(0), count=1)
        i_phase ^= 1


@gluon.jit
def _add_keys(
    s_query, s_d_out, s_ring, full, free, rows_free, i_item, b_lse, b_delta, n_start, n_shared, n_stop, n_first,
    b_begin, b_token, scale, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dQ of HALF rows, unscaled, from the keys n_start to n_stop, which the ring holds from item i_item on. Before the
    last product the rows become free."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    TYPE: gl.constexpr = s_ring.dtype
    b_none = gl.zeros([HALF, BLOCK_N], gl.float32, SCORES)
    b_d_query = gl.zeros([HALF, D], gl.float32, SUMS)
    for n_key in range(n_start, n_stop, BLOCK_N):
        s_key, s_value = s_ring.index(i_item % STAGES), s_ring.index((i_item + 1) % STAGES)
        mbarrier.wait(full.index(i_item % STAGES), i_item // STAGES & 1)
        b_scores = warpgroup_mma(s_query, s_key.permute((1, 0)), b_none, use_acc=False, is_async=True)
        mbarrier.wait(full.index((i_item + 1) % STAGES), (i_item + 1) // STAGES & 1)
        b_d_weight = warpgroup_mma(s_d_out, s_value.permute((1, 0)), b_none, use_acc=False, is_async=True)
        b_scores = warpgroup_mma_wait(1, deps=[b_scores])
        b_scores = mask_scores(b_scores, n_key, n_shared, n_first, b_begin, b_token, BLOCK_N, SCORES)
        b_weight = gl.exp2(b_scores * scale - b_lse[:, None])
        b_d_weight = warpgroup_mma_wait(0, deps=[b_d_weight])
        mbarrier.arrive(free.index((i_item + 1) % STAGES), count=1)
        mbarrier.arrive(rows_free.index(0), count=1, pred=n_key + BLOCK_N >= n_stop)
        b_d_scores = (b_weight * (b_d_weight - b_delta[:, None])).to(TYPE)
        b_left = gl.convert_layout(b_d_scores, gl.DotOperandLayout(0, SUMS, 2))
        b_d_query = warpgroup_mma(b_left, s_key, b_d_query, is_async=True)
        b_d_query = warpgroup_mma_wait(0, deps=[b_d_query])
        mbarrier.arrive(free.index(i_item % STAGES), count=1)
        i_item += 2
    return b_d_query, i_item


@gluon.jit
def _sum_query(
    p_d_query, s_query, s_d_out, s_lse, s_delta, s_begin, s_earlier, s_ring, s_store, full, free,
    rows_full, rows_free, scale, i_kv_start, i_row_start, n_rows, n_row_tiles, n_tiles, T, K, I_HALF: gl.constexpr,
    LOG2_E: gl.constexpr, G: gl.constexpr, R: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: HALF rows of each tile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    TYPE: gl.constexpr = s_query.dtype
    i_item, i_phase = i_kv_start * 0, i_kv_start * 0
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        i_part_kv, n_row = row_tile(i_tile, n_tiles, n_row_tiles, i_row_start)
        n_own = n_row + I_HALF * HALF
        n_first = n_own // G
        b_token = (n_own + gl.arange(0, HALF, gl.SliceLayout(1, SCORES))) // G
        mbarrier.wait(rows_full.index(0), i_phase)
        n_start, n_shared = number(s_begin, 0), number(s_begin, TILE_ROWS - 1)
        b_begin = s_begin.slice(I_HALF * HALF, HALF).load(gl.SliceLayout(1, SCORES))
        b_lse = s_lse.slice(I_HALF * HALF, HALF).load(gl.SliceLayout(1, SCORES))
        b_delta = s_delta.slice(I_HALF * HALF, HALF).load(gl.SliceLayout(1, SCORES))
        b_earlier = s_earlier.slice(I_HALF * HALF, HALF).load(gl.SliceLayout(1, SUMS))
        b_d_query, i_item = _add_keys(
            s_query.index(I_HALF).reshape([HALF, D]), s_d_out.index(I_HALF).reshape([HALF, D]), s_ring, full, free,
            rows_free, i_item, b_lse, b_delta, n_start, n_shared, last_token(n_row, T, G) + 1, n_first, b_begin,
            b_token, scale, D, BLOCK_N, STAGES,
        )  # fmt: skip
        b_d_query = b_d_query * (scale / LOG2_E)
        for i_choice in range(R):
            i_slot = i_item % STAGES
            mbarrier.wait(full.index(i_slot), i_item // STAGES & 1)
            b_partial = s_ring.index(i_slot).slice(I_HALF * HALF, HALF).load(SUMS).to(gl.float32)
            fence_async_shared()  # the copy engine would not wait for loads that are under way
            mbarrier.arrive(free.index(i_slot), count=1)
            # What was not chosen was not written either: it may be NaN.
            b_d_query += gl.where((i_choice < b_earlier)[:, None], b_partial, 0.0)
            i_item += 1

        s_store.index(I_HALF).store(b_d_query.to(TYPE))
        p_rows, m_rows = whole_rows(p_d_query, n_own, i_row_start + n_rows, i_kv_start + i_part_kv, K, G, D, WIDE)
        gl.store(p_rows, s_store.index(I_HALF).load(WIDE), mask=m_rows)
        i_phase ^= 1


@gluon.jit(do_not_specialize=NUMBERS)
def merge_query_hopper_kernel(
    d_key,
    d_value,
    d_partial,
    d_query,
    d_d_out,
    p_lse,
    p_delta,
    p_bounds,
    p_first,
    p_of_token,
    p_d_query,
    scale,
    i_kv_start,
    i_row_start,
    n_rows,
    T,
    K,
    n_kv,
    LOG2_E: gl.constexpr,
    G: gl.constexpr,
    R: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    n_row_tiles = (n_rows + TILE_ROWS - 1) // TILE_ROWS
    n_tiles = n_row_tiles * n_kv
    TYPE: gl.constexpr = d_key.dtype
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, D], TYPE)
    NUMBER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_query = gl.allocate_shared_memory(TYPE, [2, HALF // G, G, D], d_query.layout)
    s_d_out = gl.allocate_shared_memory(TYPE, [2, HALF // G, G, D], d_query.layout)
    s_store = gl.allocate_shared_memory(TYPE, [2, HALF, D], ROWS)
    s_ring = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_N, D], d_key.layout)
    s_lse = gl.allocate_shared_memory(gl.float32, [TILE_ROWS], NUMBER)
    s_delta = gl.allocate_shared_memory(gl.float32, [TILE_ROWS], NUMBER)
    s_begin = gl.allocate_shared_memory(gl.int32, [TILE_ROWS], NUMBER)
    s_earlier = gl.allocate_shared_memory(gl.int32, [TILE_ROWS], NUMBER)
    full, free, rows_full, rows_free = barriers(1, STAGES), barriers(2, STAGES), barriers(2, 1), barriers(2, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_sum_query, (
                p_d_query, s_query, s_d_out, s_lse, s_delta, s_begin, s_earlier, s_ring, s_store,
                full, free, rows_full, rows_free, scale, i_kv_start, i_row_start, n_rows, n_row_tiles, n_tiles, T, K, 0,
                LOG2_E, G, R, D, BLOCK_N, STAGES,
            )),
            (_sum_query, (
                p_d_query, s_query, s_d_out, s_lse, s_delta, s_begin, s_earlier, s_ring, s_store,
                full, free, rows_full, rows_free, scale, i_kv_start, i_row_start, n_rows, n_row_tiles, n_tiles, T, K, 1,
                LOG2_E, G, R, D, BLOCK_N, STAGES,
            )),
            (_bring_rows, (
                d_query, d_d_out, p_lse, p_delta, p_bounds, p_first, p_of_token, s_query, s_d_out, s_lse, s_delta,
                s_begin, s_earlier, rows_full, rows_free, i_kv_start, i_row_start, n_row_tiles, n_tiles, T, G,
            )),
            (bring_tiles, (
                d_key, d_value, d_partial, p_bounds, p_of_token, s_ring, full, free, i_kv_start, i_row_start, n_rows,
                n_row_tiles, n_tiles, T, False, G, R, D, BLOCK_N, STAGES,
            )),
        ],
        [4, 2, 1],
        [240, 32, 32],
    )  # fmt: skip


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    d_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    bounds: torch.Tensor,
    first: torch.Tensor,
    of_token: torch.Tensor,
    partial: torch.Tensor,
    *arguments: Any,
    kv_heads: int,
    sizes: Sizes,
) -> None:
    """``arguments``: those of the kernel from dQ on. ``kv_heads``: those at work."""
    tiling, kernel = TILINGS[sizes.head_dim], merge_query_hopper_kernel
    if sizes.head_dim == 64 or sizes.block_size <= SHORT_BLOCK:
        tiling, kernel = own_short.TILING, own_short.merge_query_short_hopper_kernel
    kernel[(programs(query.device),)](
        described(key, tiling.keys), described(value, tiling.keys), described_partial(partial, key, sizes, tiling.keys),
        described_rows(query, sizes), described_rows(d_out, sizes), lse, delta, bounds, first, of_token, *arguments,
        kv_heads, LOG2_E=LOG2_E, G=sizes.group, R=sizes.choose, D=sizes.head_dim, BLOCK_N=tiling.keys,
        STAGES=tiling.stages, num_warps=tiling.warps,
    )  # fmt: skip
