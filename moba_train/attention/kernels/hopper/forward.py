"""``routed_forward`` on Hopper.

Programs are as many as multiprocessors; each goes from tile to tile, 64 entries of a (kv head, block) list for each of
two or three warpgroups. One warp has the copy engine bring the block's keys and values, BLOCK_N at a time, through a
ring of STAGES buffers; two warps gather the next tile's queries while this one is attended to, having found which those
are before there was room: three loads, one after the other, that would take as long as a tile. A tile's last product
runs beside the first scores, and their softmax, of the next one: blocks are short, and their ends frequent.

While the tensor cores work, a multiprocessor issues other instructions at about a quarter of its rate: the time of a
tile is nearly the sum of both. So bfloat16 weights are taken from the largest score of a block's first key tile, and
not from a running maximum, which would cost a comparison a score and a product a number of the output. The weights of
later keys may then be large, which float32 sums and bfloat16 bear up to 2^127. A row whose sum passes 2^64 is left to
``again``; float16 has no such range and keeps the running maximum.

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

from moba_train.attention.kernels import again
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
MOST_SUM: gl.constexpr = gl.constexpr(2.0**64)  # leaves room for a product with values, and for their sum


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
def _rounded(b_weight, TYPE: gl.constexpr):
    """Weights in TYPE. A cast would be moved to where they are used, a turn later, and take twice the registers."""
    if gl.bfloat16 == TYPE:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [b_weight], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [b_weight], dtype=gl.float16, is_pure=True, pack=2
        )


@gluon.jit
def _weigh(b_scores, b_max, scale, TYPE: gl.constexpr, LEFT: gl.constexpr, SUMS: gl.constexpr):
    """Weights of a tile of keys, as an operand; each row's sums of them, one for each of the four lanes it lies in."""
    b_weight = gl.exp2(b_scores * scale - b_max[:, None])
    b_sum = gl.sum(gl.sum(gl.reshape(b_weight, [HALF, b_weight.shape[1] // 8, 4, 2]), 3), 1)
    return gl.convert_layout(_rounded(b_weight, TYPE), LEFT), gl.convert_layout(b_sum, SUMS)


@gluon.jit
def _begin(b_scores, scale, TYPE: gl.constexpr, LEFT: gl.constexpr, SUMS: gl.constexpr):
    """Of a tile's first keys: the rows' largest logits, and weights and sums as in ``_weigh``."""
    b_max = gl.max(b_scores, 1) * scale
    b_left, b_sum = _weigh(b_scores, b_max, scale, TYPE, LEFT, SUMS)
    return b_max, b_left, b_sum


@gluon.jit
def _store_lse(p_again, p_partial_lse, s_place, b_max, b_sum, RUNNING: gl.constexpr):
    """Log-sum-exps of a tile's rows; infinity, and a mark, where a sum is out of range."""
    o_place = s_place.load(b_sum.type.layout)
    b_lse = b_max + gl.log2(b_sum)
    if not RUNNING:
        m_again = (b_sum < MOST_SUM) == 0  # not a number, too
        b_lse = gl.where(m_again, float("inf"), b_lse)
        gl.store(p_again + gl.zeros_like(o_place), gl.full_like(o_place, 1), mask=m_again & (o_place >= 0))
    gl.store(p_partial_lse + o_place, b_lse, mask=o_place >= 0)


@gluon.jit
def _attend(
    p_again, p_partial, p_partial_lse, s_query, s_place, s_ring, full, free, rows_full, rows_free, turn, scale, n_tiles,
    I_OWN: gl.constexpr, WIDTH: gl.constexpr, B: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: HALF entries of each tile.

    Keys and values lie in the ring in the order of their use: k0, then k1 v0 k2 v1 ... on over the tiles. Warpgroups
    start their products one after the other, so that one's exponentials run beside another's products. The weights of
    a tile's first keys are made before the results of the tile before are stored, where there are registers for both.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    SUMS: gl.constexpr = gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )  # lanes hold the rows that they hold of SCORES
    TYPE: gl.constexpr = s_query.dtype
    RUNNING: gl.constexpr = gl.float16 == TYPE
    EARLY: gl.constexpr = WIDTH == 2
    if gl.program_id(0) < n_tiles:
        mbarrier.wait(rows_full.index(0), 0)
        b_scores = _score(s_query.index(I_OWN), s_ring, full, 0, True, SCORES, BLOCK_N, STAGES)
        b_scores = warpgroup_mma_wait(0, deps=[b_scores])
        mbarrier.arrive(free.index(0), count=1)
        if EARLY:
            b_max, b_left, b_sum = _begin(b_scores, scale, TYPE, LEFT, SUMS)
        i_item, i_turn = n_tiles * 0 + 1, n_tiles * 0
        for i_tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
            i_rows = i_turn % 2 * WIDTH + I_OWN
            s_rows = s_query.index(i_rows)
            b_out = gl.zeros([HALF, D], gl.float32, OUT)
            if not EARLY:
                b_max, b_left, b_sum = _begin(b_scores, scale, TYPE, LEFT, SUMS)
            for _ in range(BLOCK_N, B, BLOCK_N):
                i_value = i_item + 1
                mbarrier.wait(turn.index(I_OWN), (i_item // 2 & 1) ^ (I_OWN == 0))
                b_scores = _score(s_rows, s_ring, full, i_item, True, SCORES, BLOCK_N, STAGES)
                mbarrier.wait(full.index(i_value % STAGES), i_value // STAGES & 1)
                b_out = warpgroup_mma(b_left, s_ring.index(i_value % STAGES), b_out, is_async=True)
                b_scores = warpgroup_mma_wait(1, deps=[b_scores])
                mbarrier.arrive(turn.index((I_OWN + 1) % WIDTH), count=1)
                mbarrier.arrive(free.index(i_item % STAGES), count=1)
                if RUNNING:
                    b_new = gl.maximum(b_max, gl.max(b_scores, 1) * scale)
                    b_decay = gl.exp2(b_max - b_new)
                    b_sum = b_sum * gl.convert_layout(b_decay, gl.SliceLayout(1, SUMS))[:, None]
                    b_max = b_new
                b_next, b_more = _weigh(b_scores, b_max, scale, TYPE, LEFT, SUMS)
                b_sum += b_more
                b_out = warpgroup_mma_wait(0, deps=[b_out])
                mbarrier.arrive(free.index(i_value % STAGES), count=1)
                if RUNNING:
                    b_out = b_out * gl.convert_layout(b_decay, gl.SliceLayout(1, OUT))[:, None]
                b_left = b_next
                i_item += 2
            # The next tile's first scores, weights and all, are made while this tile's last product is.
            m_next = i_tile + gl.num_programs(0) < n_tiles
            i_next = i_turn + 1
            i_value = i_item + m_next.to(gl.int32)
            mbarrier.wait(rows_full.index(i_next % 2), i_next // 2 & 1, pred=m_next)
            s_next = s_query.index(i_next % 2 * WIDTH + I_OWN)
            mbarrier.wait(turn.index(I_OWN), (i_item // 2 & 1) ^ (I_OWN == 0))
            b_scores = _score(s_next, s_ring, full, i_item, m_next, SCORES, BLOCK_N, STAGES)
            mbarrier.wait(full.index(i_value % STAGES), i_value // STAGES & 1)
            b_out = warpgroup_mma(b_left, s_ring.index(i_value % STAGES), b_out, is_async=True)
            b_scores = warpgroup_mma_wait(1, deps=[b_scores])
            mbarrier.arrive(turn.index((I_OWN + 1) % WIDTH), count=1)
            mbarrier.arrive(free.index(i_item % STAGES), count=1, pred=m_next)
            b_whole = gl.convert_layout(gl.sum(b_sum, 1), gl.SliceLayout(1, SCORES))
            b_before = b_max
            if EARLY:
                b_max, b_left, b_sum = _begin(b_scores, scale, TYPE, LEFT, SUMS)
            b_out = warpgroup_mma_wait(0, deps=[b_out])
            mbarrier.arrive(free.index(i_value % STAGES), count=1)
            _store_lse(p_again, p_partial_lse, s_place.index(i_rows), b_before, b_whole, RUNNING)
            b_out = b_out * gl.convert_layout(1.0 / b_whole, gl.SliceLayout(1, OUT))[:, None]
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
    G: gl.constexpr,
    R: gl.constexpr,
    B: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    n_tiles, p_again = gl.load(p_of_list + LISTS), p_of_list + LISTS + 1
    TYPE: gl.constexpr = p_query.dtype.element_ty
    NUMBER: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, D], TYPE)
    s_query = gl.allocate_shared_memory(TYPE, [2 * WIDTH, HALF, D], ROWS)
    s_ring = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_N, D], d_key.layout)
    s_place = gl.allocate_shared_memory(gl.int32, [2 * WIDTH, HALF], NUMBER)
    s_ahead = gl.allocate_shared_memory(gl.int32, [2 * WIDTH, HALF], NUMBER)
    full, free, rows_full, rows_free = barriers(1, STAGES), barriers(WIDTH, STAGES), barriers(1, 2), barriers(WIDTH, 2)
    turn = barriers(1, WIDTH)
    fence_async_shared()
    if WIDTH == 3:
        gl.warp_specialize(
            [
                (_attend, (
                    p_again, p_partial, p_partial_lse, s_query, s_place, s_ring, full, free, rows_full, rows_free, turn,
                    scale, n_tiles, 0, WIDTH, B, D, BLOCK_N, STAGES,
                )),
                (_attend, (
                    p_again, p_partial, p_partial_lse, s_query, s_place, s_ring, full, free, rows_full, rows_free, turn,
                    scale, n_tiles, 1, WIDTH, B, D, BLOCK_N, STAGES,
                )),
                (_attend, (
                    p_again, p_partial, p_partial_lse, s_query, s_place, s_ring, full, free, rows_full, rows_free, turn,
                    scale, n_tiles, 2, WIDTH, B, D, BLOCK_N, STAGES,
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
                    p_again, p_partial, p_partial_lse, s_query, s_place, s_ring, full, free, rows_full, rows_free, turn,
                    scale, n_tiles, 0, WIDTH, B, D, BLOCK_N, STAGES,
                )),
                (_attend, (
                    p_again, p_partial, p_partial_lse, s_query, s_place, s_ring, full, free, rows_full, rows_free, turn,
                    scale, n_tiles, 1, WIDTH, B, D, BLOCK_N, STAGES,
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


def launch(*arguments: Any, tiles: int, config: Config, sizes: Sizes) -> None:
    """``arguments``: those of ``routed_forward_kernel``. ``tiles``: at most. ``config``: of that kernel."""
    query, key, value, *others = arguments
    tiling, count = TILINGS[sizes.head_dim], programs(query.device)
    routed_forward_hopper_kernel[(min(tiles, count),)](
        described(key, tiling.keys), described(value, tiling.keys), query, *others,
        WIDTH=tiling.rows // HALF.value, G=sizes.group, R=sizes.choose, B=sizes.block_size, D=sizes.head_dim,
        BLOCK_N=tiling.keys, STAGES=tiling.stages, num_warps=tiling.warps,
    )  # fmt: skip
    if query.dtype != torch.float16:
        again.launch(*arguments, tile=tiling.rows, programs=count, config=config, sizes=sizes)
