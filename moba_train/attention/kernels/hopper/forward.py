"""``routed_forward`` on Hopper.

Programs are as many as multiprocessors; each goes from tile to tile, 64 entries of a (kv head, block) list for each of
two or three warpgroups. One warp has the copy engine bring the block's keys and values, BLOCK_N at a time, through a
ring of STAGES buffers; two warps gather the next tile's queries while this one is attended to.

Work and bytes are those of the Triton kernel.
"""

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from moba_train.attention.kernels.hopper.shared import (
    HALF,
    attend_keys,
    barriers,
    bring,
    described,
    find_tile,
    gather,
    load_entries,
    programs,
    row_starts,
    thread_barrier,
)
from moba_train.attention.kernels.plan import Config, Sizes
from moba_train.attention.kernels.rows import NUMBERS

# By head_dim. At 64 the exponentials take as long as the products: a third warpgroup fills the gaps.
TILINGS = {64: Config(rows=192, keys=128, warps=4, stages=4), 128: Config(rows=128, keys=128, warps=4, stages=4)}


@gluon.jit
def _bring_keys(
    d_key, d_value, p_lists, p_bounds, s_ring, full, free, i_kv_start, n_tiles, N, B: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp: keys and values of each tile's block in the order of their use."""
    i_item = i_kv_start * 0
    i_list = gl.load(p_lists + gl.program_id(0))
    n_token = gl.load(p_bounds + i_list % N)
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        # Where the next tile's keys lie is known in time.
        i_next = gl.load(p_lists + gl.minimum(i_tile + gl.num_programs(0), n_tiles - 1))
        n_next = gl.load(p_bounds + i_next % N)
        i_column = (i_kv_start + i_list // N) * D
        i_item = bring(d_key, n_token, i_column, s_ring, full, free, i_item, STAGES)
        for n_key in range(BLOCK_N, B, BLOCK_N):
            i_item = bring(d_key, n_token + n_key, i_column, s_ring, full, free, i_item, STAGES)
            i_item = bring(d_value, n_token + n_key - BLOCK_N, i_column, s_ring, full, free, i_item, STAGES)
        i_item = bring(d_value, n_token + B - BLOCK_N, i_column, s_ring, full, free, i_item, STAGES)
        i_list, n_token = i_next, n_next


@gluon.jit
def _gather_entries(
    p_query, p_entries, s_query, s_place, i_buffer, n_start, n_stop, i_kv, i_place, K,
    G: gl.constexpr, R: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Two warps: rows of HALF entries from n_start on, past the list's end the last one again, and their places among
    the results, past the end -1."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [2, 1], [1, 0])
    VECTOR: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])
    o_entry, _ = load_entries(p_entries, n_start, n_stop, gl.SliceLayout(1, ROWS))
    o_start = row_starts(o_entry // R, i_kv, K, G, D)
    o_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    gather(s_query.index(i_buffer), p_query + (o_start[:, None] + o_d[None, :]))
    o_entry, m_row = load_entries(p_entries, n_start, n_stop, VECTOR)
    s_place.index(i_buffer).store(gl.where(m_row, i_place + o_entry, -1))


@gluon.jit
def _gather_rows(
    p_query, p_lists, p_of_list, p_offsets, p_entries, s_query, s_place, rows_full, rows_free,
    i_kv_start, i_entry_start, n_entries, n_tiles, N, P, i_part, n_parts, K, WIDTH: gl.constexpr,
    G: gl.constexpr, R: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """The gathering warps: a tile's queries, and the places of its results."""
    i_turn = i_kv_start * 0
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        i_list, n_start, n_stop = find_tile(p_lists, p_of_list, p_offsets, i_tile, N, P, i_part, n_parts, WIDTH)
        i_buffer = i_turn % 2
        mbarrier.wait(rows_free.index(i_buffer), (i_turn // 2 & 1) ^ 1)
        i_kv = i_kv_start + i_list // N
        i_place = i_list // N * n_entries - i_entry_start
        for i_own in range(WIDTH):
            _gather_entries(
                p_query, p_entries, s_query, s_place, i_buffer * WIDTH + i_own, n_start + i_own * HALF, n_stop, i_kv,
                i_place, K, G, R, D,
            )  # fmt: skip
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
        thread_barrier()  # all of the warps' copies are fenced
        mbarrier.arrive(rows_full.index(i_buffer), count=1)
        i_turn += 1


@gluon.jit
def _store_entries(p_partial, s_place, s_rows, b_rows, D: gl.constexpr):
    """Put results (HALF, D) in their places, whole rows at a time by way of shared memory."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    s_rows.store(b_rows.to(s_rows.dtype))
    o_place = s_place.load(gl.SliceLayout(1, ROWS))
    o_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    p_rows = p_partial + (o_place.to(gl.int64) * D)[:, None] + o_d[None, :]
    gl.store(p_rows, s_rows.load(ROWS), mask=(o_place >= 0)[:, None])


@gluon.jit
def _attend(
    p_partial, p_partial_lse, s_query, s_place, s_ring, full, free, rows_full, rows_free, scale, n_tiles,
    I_OWN: gl.constexpr, WIDTH: gl.constexpr, B: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: HALF entries of each tile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    b_every = gl.zeros([HALF], gl.int32, gl.SliceLayout(1, SCORES))  # not used: all rows read all keys
    i_item, i_turn = n_tiles * 0, n_tiles * 0
    for _ in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        i_buffer = i_turn % 2
        s_rows, s_rows_place = s_query.index(i_buffer * WIDTH + I_OWN), s_place.index(i_buffer * WIDTH + I_OWN)
        mbarrier.wait(rows_full.index(i_buffer), i_turn // 2 & 1)
        b_max = gl.full([HALF], -1.0e30, gl.float32, gl.SliceLayout(1, SCORES))
        b_sum = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, SCORES))
        b_out = gl.zeros([HALF, D], gl.float32, OUT)
        b_max, b_sum, b_out, i_item = attend_keys(
            b_max, b_sum, b_out, s_rows, s_ring, full, free, i_item, 0, 0, B, 0, b_every, b_every, scale, False, False,
            BLOCK_N, STAGES,
        )  # fmt: skip
        o_place = s_rows_place.load(gl.SliceLayout(1, SCORES))
        gl.store(p_partial_lse + o_place, b_max + gl.log2(b_sum), mask=o_place >= 0)
        b_out = b_out / gl.convert_layout(b_sum, gl.SliceLayout(1, OUT))[:, None]
        # The queries are read no more: their place serves to store whole rows.
        _store_entries(p_partial, s_rows_place, s_rows, b_out, D)
        mbarrier.arrive(rows_free.index(i_buffer), count=1)
        i_turn += 1


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
    WIDTH: gl.constexpr,
    G: gl.constexpr,
    R: gl.constexpr,
    B: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    n_tiles = gl.load(p_of_list + LISTS)
    TYPE: gl.constexpr = p_query.dtype.element_ty
    NUMBER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, D], TYPE)
    s_query = gl.allocate_shared_memory(TYPE, [2 * WIDTH, HALF, D], ROWS)
    s_ring = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_N, D], d_key.layout)
    s_place = gl.allocate_shared_memory(gl.int32, [2 * WIDTH, HALF], NUMBER)
    full, free, rows_full, rows_free = barriers(1, STAGES), barriers(WIDTH, STAGES), barriers(1, 2), barriers(WIDTH, 2)
    fence_async_shared()
    if WIDTH == 3:
        gl.warp_specialize(
            [
                (_attend, (
                    p_partial, p_partial_lse, s_query, s_place, s_ring, full, free, rows_full, rows_free, scale,
                    n_tiles, 0, WIDTH, B, D, BLOCK_N, STAGES,
                )),
                (_attend, (
                    p_partial, p_partial_lse, s_query, s_place, s_ring, full, free, rows_full, rows_free, scale,
                    n_tiles, 1, WIDTH, B, D, BLOCK_N, STAGES,
                )),
                (_attend, (
                    p_partial, p_partial_lse, s_query, s_place, s_ring, full, free, rows_full, rows_free, scale,
                    n_tiles, 2, WIDTH, B, D, BLOCK_N, STAGES,
                )),
                (_gather_rows, (
                    p_query, p_lists, p_of_list, p_offsets, p_entries, s_query, s_place, rows_full, rows_free,
                    i_kv_start, i_entry_start, n_entries, n_tiles, N, P, i_part, n_parts, K, WIDTH, G, R, D,
                )),
                (_bring_keys, (
                    d_key, d_value, p_lists, p_bounds, s_ring, full, free, i_kv_start, n_tiles, N, B, D, BLOCK_N,
                    STAGES,
                )),
            ],
            [4, 4, 2, 1],
            [160, 160, 32, 32],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend, (
                    p_partial, p_partial_lse, s_query, s_place, s_ring, full, free, rows_full, rows_free, scale,
                    n_tiles, 0, WIDTH, B, D, BLOCK_N, STAGES,
                )),
                (_attend, (
                    p_partial, p_partial_lse, s_query, s_place, s_ring, full, free, rows_full, rows_free, scale,
                    n_tiles, 1, WIDTH, B, D, BLOCK_N, STAGES,
                )),
                (_gather_rows, (
                    p_query, p_lists, p_of_list, p_offsets, p_entries, s_query, s_place, rows_full, rows_free,
                    i_kv_start, i_entry_start, n_entries, n_tiles, N, P, i_part, n_parts, K, WIDTH, G, R, D,
                )),
                (_bring_keys, (
                    d_key, d_value, p_lists, p_bounds, s_ring, full, free, i_kv_start, n_tiles, N, B, D, BLOCK_N,
                    STAGES,
                )),
            ],
            [4, 2, 1],
            [240, 32, 32],
        )  # fmt: skip


def launch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *arguments: Any, tiles: int, sizes: Sizes
) -> None:
    """``arguments``: those of the kernel from the blocks' bounds on. ``tiles``: at most."""
    tiling = TILINGS[sizes.head_dim]
    routed_forward_hopper_kernel[(min(tiles, programs(query.device)),)](
        described(key, tiling.keys), described(value, tiling.keys), query, *arguments,
        WIDTH=tiling.rows // HALF.value, G=sizes.group, R=sizes.choose, B=sizes.block_size, D=sizes.head_dim,
        BLOCK_N=tiling.keys, STAGES=tiling.stages, num_warps=tiling.warps,
    )  # fmt: skip
