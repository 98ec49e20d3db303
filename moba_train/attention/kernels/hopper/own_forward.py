"""``merge`` on Hopper.

Programs are as many as multiprocessors; each goes from tile to tile, 2 x 64 consecutive rows of a kv head. One warp has
the copy engine bring a tile's R partial outputs, then its keys and values, through a ring of STAGES buffers; two warps
see to the next tile's queries and its rows' numbers. Two warpgroups own 64 rows each: they fold the partial outputs,
r = 0, 1, ..., and go on with the own block's keys.

Work and bytes are those of the Triton kernel.
"""

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from moba_train.attention.kernels.hopper.own import (
    TILE_ROWS,
    bring_tiles,
    described_partial,
    described_rows,
    last_token,
    number,
    row_tile,
)
from moba_train.attention.kernels.hopper.shared import (
    HALF,
    attend_keys,
    barriers,
    copy_tile,
    described,
    programs,
    row_starts,
)
from moba_train.attention.kernels.plan import Config, Sizes
from moba_train.attention.kernels.rows import NUMBERS

TILING = Config(rows=128, keys=128, warps=4, stages=4)
TILINGS = {64: TILING, 128: TILING}  # by head_dim


@gluon.jit
def _bring_rows(
    d_query, p_bounds, p_first, p_of_token, p_partial_lse, s_query, s_begin, s_other, rows_full, rows_free, i_kv_start,
    i_row_start, n_rows, n_row_tiles, n_tiles, T, G: gl.constexpr, R: gl.constexpr,
):  # fmt: skip
    """A tile's queries, where each row's block begins, and its partial log-sum-exps."""
    VECTOR: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])
    o_vector = gl.arange(0, TILE_ROWS, VECTOR)
    i_turn = i_kv_start * 0
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        i_part_kv, n_row = row_tile(i_tile, n_tiles, n_row_tiles, i_row_start)
        i_buffer = i_turn % 2
        o_row = gl.minimum(n_row + o_vector, T * G - 1)
        b_own = gl.load(p_of_token + o_row // G)
        b_begin = gl.load(p_bounds + b_own)
        mbarrier.wait(rows_free.index(i_buffer), (i_turn // 2 & 1) ^ 1)
        mbarrier.expect(rows_full.index(i_buffer), 2 * d_query.block_type.nbytes)
        for i_half in gl.static_range(2):
            place = [(n_row + i_half * HALF) // G, (i_kv_start + i_part_kv) * G, 0]
            copy_tile(d_query, place, rows_full.index(i_buffer), s_query.index(i_buffer * 2 + i_half))
        s_begin.index(i_buffer).store(b_begin)
        if R > 0:
            b_earlier = b_own - gl.load(p_first + b_own)
            o_partial = (i_part_kv.to(gl.int64) * n_rows + (n_row - i_row_start + o_vector)) * R
            m_row = n_row + o_vector < i_row_start + n_rows
            for i_choice in gl.static_range(R):
                m_chosen = m_row & (i_choice < b_earlier)
                b_other = gl.load(p_partial_lse + o_partial + i_choice, mask=m_chosen, other=-float("inf"))
                s_other.index(i_buffer * R + i_choice).store(b_other)
        mbarrier.arrive(rows_full.index(i_buffer), count=1)
        i_turn += 1


@gluon.jit
def _fold(
    s_ring, s_other, full, free, i_item, i_buffer, I_HALF: gl.constexpr, R: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, SCORES: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """The softmax that the partial outputs make: largest logit, sum, output, and the next item of the ring."""
    # Finite, so that a tile in which a row reads nothing leaves weights of 0 and not of NaN.
    b_max = gl.full([HALF], -1.0e30, gl.float32, gl.SliceLayout(1, SCORES))
    b_sum = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, SCORES))
    b_out = gl.zeros([HALF, D], gl.float32, OUT)
    for i_choice in gl.static_range(R):
        s_row = s_other.index(i_buffer * R + i_choice).slice(I_HALF * HALF, HALF)
        b_max = gl.maximum(b_max, s_row.load(gl.SliceLayout(1, SCORES)))
    for i_choice in range(R):
        i_slot = i_item % STAGES
        s_row = s_other.index(i_buffer * R + i_choice).slice(I_HALF * HALF, HALF)
        b_weight = gl.exp2(s_row.load(gl.SliceLayout(1, SCORES)) - b_max)
        b_sum += b_weight
        b_weight = gl.convert_layout(b_weight, gl.SliceLayout(1, OUT))[:, None]
        mbarrier.wait(full.index(i_slot), i_item // STAGES & 1)
        b_partial = s_ring.index(i_slot).slice(I_HALF * HALF, HALF).load(OUT).to(gl.float32)
        fence_async_shared()  # the copy engine would not wait for loads that are under way
        mbarrier.arrive(free.index(i_slot), count=1)
        # What was not chosen was not written either: it may be NaN.
        b_out += gl.where(b_weight > 0, b_partial, 0.0) * b_weight
        i_item += 1
    return b_max, b_sum, b_out, i_item


@gluon.jit
def _attend(
    p_out, p_lse, s_query, s_begin, s_other, s_ring, full, free, rows_full, rows_free, scale,
    i_kv_start, i_row_start, n_rows, n_row_tiles, n_tiles, T, K, I_HALF: gl.constexpr, G: gl.constexpr,
    R: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: HALF rows of each tile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    TYPE: gl.constexpr = s_query.dtype
    i_item, i_turn = i_kv_start * 0, i_kv_start * 0
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        i_part_kv, n_row = row_tile(i_tile, n_tiles, n_row_tiles, i_row_start)
        i_buffer = i_turn % 2
        n_own = n_row + I_HALF * HALF
        n_first = n_own // G
        b_token = (n_own + gl.arange(0, HALF, gl.SliceLayout(1, SCORES))) // G
        s_rows = s_query.index(i_buffer * 2 + I_HALF).reshape([HALF, D])
        mbarrier.wait(rows_full.index(i_buffer), i_turn // 2 & 1)
        n_start, n_shared = number(s_begin.index(i_buffer), 0), number(s_begin.index(i_buffer), TILE_ROWS - 1)
        b_begin = s_begin.index(i_buffer).slice(I_HALF * HALF, HALF).load(gl.SliceLayout(1, SCORES))
        b_max, b_sum, b_out, i_item = _fold(
            s_ring, s_other, full, free, i_item, i_buffer, I_HALF, R, D, STAGES, SCORES, OUT
        )
        b_max, b_sum, b_out, i_item = attend_keys(
            b_max, b_sum, b_out, s_rows, s_ring, full, free, i_item, n_start, n_shared, last_token(n_row, T, G) + 1,
            n_first, b_begin, b_token, scale, R > 0, True, BLOCK_N, STAGES,
        )  # fmt: skip

        i_kv = i_kv_start + i_part_kv
        n_row_stop = i_row_start + n_rows
        o_row = n_own + gl.arange(0, HALF, gl.SliceLayout(1, SCORES))
        gl.store(p_lse + i_kv.to(gl.int64) * T * G + o_row, b_max + gl.log2(b_sum), mask=o_row < n_row_stop)
        b_out = b_out * gl.convert_layout(1.0 / b_sum, gl.SliceLayout(1, OUT))[:, None]
        # The queries are read no more: their place serves to store whole rows.
        s_rows.store(b_out.to(TYPE))
        o_row = n_own + gl.arange(0, HALF, gl.SliceLayout(1, WIDE))
        o_start = row_starts(o_row, i_kv, K, G, D)
        o_d = gl.arange(0, D, gl.SliceLayout(0, WIDE))
        b_store = s_rows.load(WIDE)
        fence_async_shared()
        mbarrier.arrive(rows_free.index(i_buffer), count=1)
        gl.store(p_out + (o_start[:, None] + o_d[None, :]), b_store, mask=(o_row < n_row_stop)[:, None])
        i_turn += 1


@gluon.jit(do_not_specialize=NUMBERS)
def merge_hopper_kernel(
    d_key,
    d_value,
    d_partial,
    d_query,
    p_bounds,
    p_first,
    p_of_token,
    p_partial_lse,
    p_out,
    p_lse,
    scale,
    i_kv_start,
    i_row_start,
    n_rows,
    T,
    K,
    n_kv,
    G: gl.constexpr,
    R: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    n_row_tiles = (n_rows + TILE_ROWS - 1) // TILE_ROWS
    n_tiles = n_row_tiles * n_kv
    TYPE: gl.constexpr = d_key.dtype
    NUMBER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_query = gl.allocate_shared_memory(TYPE, [4, HALF // G, G, D], d_query.layout)
    s_ring = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_N, D], d_key.layout)
    s_begin = gl.allocate_shared_memory(gl.int32, [2, TILE_ROWS], NUMBER)
    s_other = gl.allocate_shared_memory(gl.float32, [2 * max(R, 1), TILE_ROWS], NUMBER)
    full, free, rows_full, rows_free = barriers(1, STAGES), barriers(2, STAGES), barriers(2, 2), barriers(2, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_attend, (
                p_out, p_lse, s_query, s_begin, s_other, s_ring, full, free, rows_full, rows_free,
                scale, i_kv_start, i_row_start, n_rows, n_row_tiles, n_tiles, T, K, 0, G, R, D, BLOCK_N, STAGES,
            )),
            (_attend, (
                p_out, p_lse, s_query, s_begin, s_other, s_ring, full, free, rows_full, rows_free,
                scale, i_kv_start, i_row_start, n_rows, n_row_tiles, n_tiles, T, K, 1, G, R, D, BLOCK_N, STAGES,
            )),
            (_bring_rows, (
                d_query, p_bounds, p_first, p_of_token, p_partial_lse, s_query, s_begin, s_other, rows_full, rows_free,
                i_kv_start, i_row_start, n_rows, n_row_tiles, n_tiles, T, G, R,
            )),
            (bring_tiles, (
                d_key, d_value, d_partial, p_bounds, p_of_token, s_ring, full, free, i_kv_start, i_row_start, n_rows,
                n_row_tiles, n_tiles, T, True, G, R, D, BLOCK_N, STAGES,
            )),
        ],
        [4, 2, 1],
        [240, 32, 32],
    )  # fmt: skip


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    first: torch.Tensor,
    of_token: torch.Tensor,
    partial: torch.Tensor,
    *arguments: Any,
    kv_heads: int,
    sizes: Sizes,
) -> None:
    """``arguments``: those of the kernel from the partial log-sum-exps on. ``kv_heads``: those at work."""
    merge_hopper_kernel[(programs(query.device),)](
        described(key, TILING.keys), described(value, TILING.keys), described_partial(partial, key, sizes),
        described_rows(query, sizes), bounds, first, of_token, *arguments, kv_heads, G=sizes.group, R=sizes.choose,
        D=sizes.head_dim, BLOCK_N=TILING.keys, STAGES=TILING.stages, num_warps=TILING.warps,
    )  # fmt: skip
