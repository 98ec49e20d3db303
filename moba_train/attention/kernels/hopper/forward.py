"""``routed_forward`` on Hopper.

Programs are as many as multiprocessors; each goes from tile to tile, 64 entries of a (kv head, block) list for each of
two or three warpgroups. One warp has the copy engine bring the block's keys and values, BLOCK_N at a time, through a
ring of STAGES buffers; two warps gather the next tile's queries while this one is attended to, having found which those
are before there was room: three loads, one after the other, that would take as long as a tile. A tile's last product
runs beside the first scores, and their softmax, of the next one: blocks are short, and their ends frequent.

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

from moba_train.attention.kernels.hopper.shared import (
    HALF,
    barriers,
    bring,
    described,
    find_tile,
    gather,
    load_entries,
    programs,
    thread_barrier,
)
from moba_train.attention.kernels.plan import Config, Sizes
from moba_train.attention.kernels.rows import NUMBERS

# By head_dim. At 64 the exponentials take as long as the products: a third warpgroup fills the gaps.
TILINGS = {64: Config(rows=192, keys=128, warps=4, stages=4), 128: Config(rows=128, keys=128, warps=4, stages=4)}
MOST_TURNS = 1024  # keys of a block: in longer ones warpgroups find their rhythm, and waiting for turns costs more


@gluon.jit
def _bring_keys(
    d_key, d_value, p_lists, p_bounds, s_ring, full, free, i_kv_start, n_tiles, N, B: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp: keys and values of each tile's block in the order of their use."""
    if gl.program_id(0) < n_tiles:
        i_list = gl.load(p_lists + gl.program_id(0))
        n_token, i_column = gl.load(p_bounds + i_list % N), (i_kv_start + i_list // N) * D
        i_item = bring(d_key, n_token, i_column, s_ring, full, free, i_kv_start * 0, STAGES)
        for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
            # Where the next tile's keys lie is known in time.
            i_next = i_tile + gl.num_programs(0)
            i_list = gl.load(p_lists + gl.minimum(i_next, n_tiles - 1))
            n_next, i_next_column = gl.load(p_bounds + i_list % N), (i_kv_start + i_list // N) * D
            for n_key in range(BLOCK_N, B, BLOCK_N):
                i_item = bring(d_key, n_token + n_key, i_column, s_ring, full, free, i_item, STAGES)
                i_item = bring(d_value, n_token + n_key - BLOCK_N, i_column, s_ring, full, free, i_item, STAGES)
            if i_next < n_tiles:
                i_item = bring(d_key, n_next, i_next_column, s_ring, full, free, i_item, STAGES)
            i_item = bring(d_value, n_token + B - BLOCK_N, i_column, s_ring, full, free, i_item, STAGES)
            n_token, i_column = n_next, i_next_column


@gluon.jit
def _list_rows(
    p_lists, p_of_list, p_offsets, p_entries, s_ahead, i_tile, i_kv_start, i_entry_start, n_entries, n_tiles, N, P,
    i_part, n_parts, K, WIDTH: gl.constexpr, G: gl.constexpr, R: gl.constexpr,
):  # fmt: skip
    """Where a tile's queries lie, in rows of D numbers, and where its results go. Past the list's end the last query
    comes again, and its result goes to -1."""
    VECTOR: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])
    i_tile = gl.minimum(i_tile, n_tiles - 1)
    i_list, n_start, n_stop = find_tile(p_lists, p_of_list, p_offsets, i_tile, N, P, i_part, n_parts, WIDTH)
    i_kv = i_kv_start + i_list // N
    i_place = i_list // N * n_entries - i_entry_start
    for i_own in gl.static_range(WIDTH):
        o_entry, m_row = load_entries(p_entries, n_start + i_own * HALF, n_stop, VECTOR)
        o_row = o_entry // R
        s_ahead.index(i_own).store((o_row // G * K + i_kv) * G + o_row % G)
        s_ahead.index(WIDTH + i_own).store(gl.where(m_row, i_place + o_entry, -1))


@gluon.jit
def _gather_rows(
    p_query, p_lists, p_of_list, p_offsets, p_entries, s_query, s_place, s_ahead, rows_full, rows_free,
    i_kv_start, i_entry_start, n_entries, n_tiles, N, P, i_part, n_parts, K, WIDTH: gl.constexpr,
    G: gl.constexpr, R: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """The gathering warps: a tile's queries, and the places of its results."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [2, 1], [1, 0])
    VECTOR: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])
    o_d = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    i_turn = i_kv_start * 0
    if gl.program_id(0) < n_tiles:
        _list_rows(
            p_lists, p_of_list, p_offsets, p_entries, s_ahead, gl.program_id(0), i_kv_start, i_entry_start, n_entries,
            n_tiles, N, P, i_part, n_parts, K, WIDTH, G, R,
        )  # fmt: skip
    for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        i_buffer = i_turn % 2
        mbarrier.wait(rows_free.index(i_buffer), (i_turn // 2 & 1) ^ 1)
        for i_own in range(WIDTH):
            o_row = s_ahead.index(i_own).load(gl.SliceLayout(1, ROWS))
            p_rows = p_query + ((o_row.to(gl.int64) * D)[:, None] + o_d[None, :])
            gather(s_query.index(i_buffer * WIDTH + i_own), p_rows)
            s_place.index(i_buffer * WIDTH + i_own).store(s_ahead.index(WIDTH + i_own).load(VECTOR))
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
        thread_barrier()  # all of the warps' copies are fenced
        mbarrier.arrive(rows_full.index(i_buffer), count=1)
        _list_rows(
            p_lists, p_of_list, p_offsets, p_entries, s_ahead, i_tile + gl.num_programs(0), i_kv_start, i_entry_start,
            n_entries, n_tiles, N, P, i_part, n_parts, K, WIDTH, G, R,
        )  # fmt: skip
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
def _score(
    s_rows, s_ring, full, i_item, m_there, SCORES: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Start the scores of a warpgroup's rows with the keys in the ring's item i_item; not to be used unless m_there."""
    b_none = gl.zeros([HALF, BLOCK_N], gl.float32, SCORES)
    mbarrier.wait(full.index(i_item % STAGES), i_item // STAGES & 1, pred=m_there)
    s_key = s_ring.index(i_item % STAGES)
    return warpgroup_mma(s_rows, s_key.permute((1, 0)), b_none, use_acc=False, is_async=True)


@gluon.jit
def _softmax_step(b_scores, b_max, b_sum, scale, TYPE: gl.constexpr, LEFT: gl.constexpr):
    """Weights of a tile of keys, as an operand; the running maximum and sum; by what to multiply earlier results."""
    b_new = gl.maximum(b_max, gl.max(b_scores, 1) * scale)
    b_weight = gl.exp2(b_scores * scale - b_new[:, None])
    b_decay = gl.exp2(b_max - b_new)
    b_sum = b_sum * b_decay + gl.sum(b_weight, 1)
    return gl.convert_layout(b_weight.to(TYPE), LEFT), b_new, b_sum, b_decay


@gluon.jit
def _attend(
    p_partial, p_partial_lse, s_query, s_place, s_ring, full, free, rows_full, rows_free, turn, scale, n_tiles,
    I_OWN: gl.constexpr, WIDTH: gl.constexpr, TURNS: gl.constexpr, B: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: HALF entries of each tile.

    Keys and values lie in the ring in the order of their use: k0, then k1 v0 k2 v1 ... on over the tiles. With TURNS
    warpgroups start their products one after the other, so that one's exponentials run beside another's products.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    TYPE: gl.constexpr = s_query.dtype
    if gl.program_id(0) < n_tiles:
        b_least = gl.full([HALF], -1.0e30, gl.float32, gl.SliceLayout(1, SCORES))
        b_empty = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, SCORES))
        mbarrier.wait(rows_full.index(0), 0)
        b_scores = _score(s_query.index(I_OWN), s_ring, full, 0, True, SCORES, BLOCK_N, STAGES)
        b_scores = warpgroup_mma_wait(0, deps=[b_scores])
        mbarrier.arrive(free.index(0), count=1)
        b_left, b_max, b_sum, b_decay = _softmax_step(b_scores, b_least, b_empty, scale, TYPE, LEFT)
        i_item, i_turn = n_tiles * 0 + 1, n_tiles * 0
        for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
            i_rows = i_turn % 2 * WIDTH + I_OWN
            s_rows = s_query.index(i_rows)
            b_out = gl.zeros([HALF, D], gl.float32, OUT)
            for _ in range(BLOCK_N, B, BLOCK_N):
                i_value = i_item + 1
                if TURNS:
                    mbarrier.wait(turn.index(I_OWN), (i_item // 2 & 1) ^ (I_OWN == 0))
                b_scores = _score(s_rows, s_ring, full, i_item, True, SCORES, BLOCK_N, STAGES)
                mbarrier.wait(full.index(i_value % STAGES), i_value // STAGES & 1)
                b_out = warpgroup_mma(b_left, s_ring.index(i_value % STAGES), b_out, is_async=True)
                if TURNS:
                    mbarrier.arrive(turn.index((I_OWN + 1) % WIDTH), count=1)
                b_scores = warpgroup_mma_wait(1, deps=[b_scores])
                mbarrier.arrive(free.index(i_item % STAGES), count=1)
                b_next, b_max, b_sum, b_decay = _softmax_step(b_scores, b_max, b_sum, scale, TYPE, LEFT)
                b_out = warpgroup_mma_wait(0, deps=[b_out])
                mbarrier.arrive(free.index(i_value % STAGES), count=1)
                b_out = b_out * gl.convert_layout(b_decay, gl.SliceLayout(1, OUT))[:, None]
                b_left = b_next
                i_item += 2
            # The next tile's first scores, weights and all, are made while this tile's last product is.
            m_next = i_tile + gl.num_programs(0) < n_tiles
            i_next = i_turn + 1
            i_value = i_item + m_next.to(gl.int32)
            mbarrier.wait(rows_full.index(i_next % 2), i_next // 2 & 1, pred=m_next)
            s_next = s_query.index(i_next % 2 * WIDTH + I_OWN)
            if TURNS:
                mbarrier.wait(turn.index(I_OWN), (i_item // 2 & 1) ^ (I_OWN == 0))
            b_scores = _score(s_next, s_ring, full, i_item, m_next, SCORES, BLOCK_N, STAGES)
            mbarrier.wait(full.index(i_value % STAGES), i_value // STAGES & 1)
            b_out = warpgroup_mma(b_left, s_ring.index(i_value % STAGES), b_out, is_async=True)
            if TURNS:
                mbarrier.arrive(turn.index((I_OWN + 1) % WIDTH), count=1)
            b_scores = warpgroup_mma_wait(1, deps=[b_scores])
            mbarrier.arrive(free.index(i_item % STAGES), count=1, pred=m_next)
            b_lse, b_share = b_max + gl.log2(b_sum), 1.0 / b_sum
            b_left, b_max, b_sum, b_decay = _softmax_step(b_scores, b_least, b_empty, scale, TYPE, LEFT)
            b_out = warpgroup_mma_wait(0, deps=[b_out])
            mbarrier.arrive(free.index(i_value % STAGES), count=1)
            o_place = s_place.index(i_rows).load(gl.SliceLayout(1, SCORES))
            gl.store(p_partial_lse + o_place, b_lse, mask=o_place >= 0)
            b_out = b_out * gl.convert_layout(b_share, gl.SliceLayout(1, OUT))[:, None]
            # The queries are read no more: their place serves to store whole rows.
            _store_entries(p_partial, s_place.index(i_rows), s_rows, b_out, D)
            mbarrier.arrive(rows_free.index(i_turn % 2), count=1)
            i_item = i_value + 1
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
    TURNS: gl.constexpr,
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
    s_ahead = gl.allocate_shared_memory(gl.int32, [2 * WIDTH, HALF], NUMBER)
    full, free, rows_full, rows_free = barriers(1, STAGES), barriers(WIDTH, STAGES), barriers(1, 2), barriers(WIDTH, 2)
    turn = barriers(1, WIDTH) if TURNS else rows_full  # not used then: ``key_value`` says why no barrier may be there
    fence_async_shared()
    if WIDTH == 3:
        gl.warp_specialize(
            [
                (_attend, (
                    p_partial, p_partial_lse, s_query, s_place, s_ring, full, free, rows_full, rows_free, turn, scale,
                    n_tiles, 0, WIDTH, TURNS, B, D, BLOCK_N, STAGES,
                )),
                (_attend, (
                    p_partial, p_partial_lse, s_query, s_place, s_ring, full, free, rows_full, rows_free, turn, scale,
                    n_tiles, 1, WIDTH, TURNS, B, D, BLOCK_N, STAGES,
                )),
                (_attend, (
                    p_partial, p_partial_lse, s_query, s_place, s_ring, full, free, rows_full, rows_free, turn, scale,
                    n_tiles, 2, WIDTH, TURNS, B, D, BLOCK_N, STAGES,
                )),
                (_gather_rows, (
                    p_query, p_lists, p_of_list, p_offsets, p_entries, s_query, s_place, s_ahead, rows_full, rows_free,
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
                    p_partial, p_partial_lse, s_query, s_place, s_ring, full, free, rows_full, rows_free, turn, scale,
                    n_tiles, 0, WIDTH, TURNS, B, D, BLOCK_N, STAGES,
                )),
                (_attend, (
                    p_partial, p_partial_lse, s_query, s_place, s_ring, full, free, rows_full, rows_free, turn, scale,
                    n_tiles, 1, WIDTH, TURNS, B, D, BLOCK_N, STAGES,
                )),
                (_gather_rows, (
                    p_query, p_lists, p_of_list, p_offsets, p_entries, s_query, s_place, s_ahead, rows_full, rows_free,
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
        WIDTH=tiling.rows // HALF.value, TURNS=sizes.block_size <= MOST_TURNS, G=sizes.group, R=sizes.choose,
        B=sizes.block_size, D=sizes.head_dim, BLOCK_N=tiling.keys, STAGES=tiling.stages, num_warps=tiling.warps,
    )  # fmt: skip
