"""The fast rounds of ``select``, on Hopper.

A program owns 4 x 64 rows of one kv head. Four warps have the copy engine bring the representatives, BLOCK_N blocks at
a time. Four warpgroups own 64 rows each. One passes the scores of its rows through shared memory, after which two
neighbouring lanes hold a row and a warp 16 of them: the rounds need one exchange between lanes and no barrier, and a
warp makes as many as its own rows ask for.

Rounds, and what they leave unsettled, are those of the Triton kernel, which starts over where this one says so. So are
work and bytes, but that the representatives come from L2 once for 256 rows.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moba_train.attention.blocks import Blocks
from moba_train.attention.kernels.hopper.shared import HALF, barriers, copy_tile, described, load_rows, reinterpret
from moba_train.attention.kernels.plan import Config
from moba_train.attention.kernels.rows import NUMBERS

TILING = Config(rows=256, keys=64, warps=4, stages=2)  # keys: blocks
HEAD_DIMS = (64, 128)
MOST_CHOICES = 8
LONG_SEGMENT = 512  # blocks; with far fewer a program's start takes too much of its time
ROWS: gl.constexpr = gl.constexpr(TILING.rows)
WARP_ROWS: gl.constexpr = gl.constexpr(16)
# A multiple of TIE is finite, and twice as much is not.
HUGE: gl.constexpr = gl.constexpr(2.0**105)


@gluon.jit
def _uniform(number):
    """The same number, now known to be one for all lanes: what depends on it stays out of their registers."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _warp():
    """Which of its warpgroup's warps this is. Unlike other scalars it differs: no barrier may depend on it."""
    return gl.inline_asm_elementwise(
        "{ mov.u32 $0, %tid.x; bfe.u32 $0, $0, 5, 2; }", "=r", [], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _lane_sums(b_numbers):
    """(rows, 2): each lane's sum of a row's numbers, in four chains: one would be a long one."""
    LANES: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [4, 1], [1, 0])
    b_sums = gl.sum(gl.sum(b_numbers.reshape(b_numbers.shape[0], b_numbers.shape[1] // 8, 2, 4), 1), 2)
    return gl.convert_layout(b_sums, LANES, assert_trivial=True)


@gluon.jit
def _row_max(b_numbers):
    b_largest = gl.max(gl.max(b_numbers.reshape(b_numbers.shape[0], b_numbers.shape[1] // 8, 2, 4), 1), 2)
    return gl.max(b_largest, 1)


@gluon.jit
def _places(BLOCK_N: gl.constexpr, TIE: gl.constexpr, SCORES: gl.constexpr):
    """TIE + the place of each column among those of its lane, which has every other four: the same in both lanes, so
    that places are part of the instructions."""
    o_column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    return (o_column // 8 * 4 + o_column % 4 + TIE).to(gl.float32)


@gluon.jit
def _row_place(b_hit, o_place):
    """The sum of the places that are hit; those of the second lane follow those of the first."""
    b_sums = _lane_sums(b_hit * o_place[None, :])
    o_lane = gl.arange(0, 2, gl.SliceLayout(0, b_sums.type.layout)).to(gl.float32)
    return gl.sum(b_sums + gl.where(b_sums > 0.0, 1.0, 0.0) * (o_lane * (b_hit.shape[1] // 2))[None, :], 1)


@gluon.jit
def _column(o_place, BLOCK_N: gl.constexpr):
    """The column of a place, as both count on over tiles."""
    o_own = o_place % (BLOCK_N // 2)
    return o_place // BLOCK_N * BLOCK_N + o_own // 4 * 8 + o_place % BLOCK_N // (BLOCK_N // 2) * 4 + o_own % 4


@gluon.jit
def _insert(b_scores, o_place, n_place, b_best, b_index, n_rounds, TAKEN: gl.constexpr):
    """``_insert_fast`` of the Triton kernel, for a warp: scores (WARP_ROWS, BLOCK_N) whose places start at n_place,
    best pairs (WARP_ROWS, SLOTS). Where scores that count are equal, what goes in is no number: it stays."""
    SCORES: gl.constexpr = gl.SliceLayout(1, b_scores.type.layout)
    PAIRS: gl.constexpr = gl.SliceLayout(1, b_best.type.layout)
    for _ in range(n_rounds):
        b_top = gl.convert_layout(_row_max(b_scores), SCORES, assert_trivial=True)
        b_hit = gl.where(b_scores == b_top[:, None], 1.0, 0.0)
        b_place = gl.convert_layout(_row_place(b_hit, o_place), PAIRS, assert_trivial=True)
        b_scores = b_scores + b_hit * TAKEN
        b_worst = gl.min(b_best, 1)
        m_worst = b_best == b_worst[:, None]
        b_last = gl.max(gl.where(m_worst, b_index, -1.0), 1)
        b_top = gl.convert_layout(b_top, PAIRS, assert_trivial=True)
        m_slot = m_worst & (b_index == b_last[:, None]) & (b_top > b_worst)[:, None]
        b_best = gl.where(m_slot, (b_top + (b_place * HUGE) * 0.0)[:, None], b_best)
        b_index = gl.where(m_slot, (b_place + n_place)[:, None], b_index)
    return b_best, b_index


@gluon.jit
def _store_choices(
    p_first, p_of_token, p_choice, p_unsettled, b_best, b_index, n_row, n_start, i_kv, T, G: gl.constexpr,
    R: gl.constexpr, NONE: gl.constexpr, LOWEST: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Choices of a warpgroup's rows, from their best pairs (HALF, SLOTS), and whether any of them is unsettled."""
    o_row = n_row + gl.arange(0, HALF, gl.SliceLayout(1, b_best.type.layout))
    o_slot = gl.arange(0, b_best.shape[1], gl.SliceLayout(0, b_best.type.layout))
    b_own = gl.load(p_of_token + gl.minimum(o_row, T * G - 1) // G)
    b_first = gl.load(p_first + b_own)
    m_row = o_row < T * G
    m_slot = (o_slot < R)[None, :]
    b_sure = gl.sum((m_slot & (b_best > LOWEST) & (b_best < float("inf"))).to(gl.int32), 1)
    b_unsettled = (m_row & (b_sure < gl.minimum(b_own - b_first, R))).to(gl.int32)
    p_row_tile = p_unsettled + (i_kv * ((T * G + HALF - 1) // HALF) + n_row // HALF)
    gl.store(p_row_tile, gl.max(b_unsettled, 0).to(gl.int8), mask=n_row < T * G)
    b_block = n_start + _column(b_index.to(gl.int32) - n_start, BLOCK_N)
    b_choice = gl.where(b_best > LOWEST, b_block - b_first[:, None], NONE)
    p_rows = p_choice + (i_kv.to(gl.int64) * T * G + o_row)[:, None] * R + o_slot[None, :]
    gl.store(p_rows, b_choice.to(p_choice.dtype.element_ty), mask=m_row[:, None] & m_slot)


@gluon.jit
def _choose(
    p_query, p_first, p_of_token, p_choice, p_unsettled, s_queries, s_high, s_low, full, free, n_first_row, n_start,
    n_tiles, i_kv, T, K, I_GROUP: gl.constexpr, G: gl.constexpr, R: gl.constexpr, SLOTS: gl.constexpr,
    NONE: gl.constexpr, LOWEST: gl.constexpr, TAKEN: gl.constexpr, TIE: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warpgroup: HALF rows. Past the last row it repeats, and is not stored."""
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SCORES: gl.constexpr = gl.BlockedLayout([1, 4], [16, 2], [4, 1], [1, 0])
    PAIRS: gl.constexpr = gl.BlockedLayout([1, SLOTS // 2], [16, 2], [4, 1], [1, 0])
    QUERIES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    n_row = n_first_row + I_GROUP * HALF
    n_last = T * G - 1
    i_warp = _warp()
    i_own_low = _uniform(gl.load(p_of_token + gl.minimum(n_row, n_last) // G))
    i_own_high = gl.load(p_of_token + gl.minimum(n_row + HALF - 1, n_last) // G)
    o_row = n_row + i_warp * WARP_ROWS + gl.arange(0, WARP_ROWS, gl.SliceLayout(1, SCORES))
    b_own = gl.load(p_of_token + gl.minimum(o_row, n_last) // G)
    o_query = gl.minimum(n_row + gl.arange(0, HALF, gl.SliceLayout(1, QUERIES)), n_last)
    load_rows(p_query, o_query, i_kv, s_queries.index(I_GROUP), K, G, D, QUERIES)
    # From n_shared to i_own_low every row may choose every block: no mask there.
    n_shared = _uniform(gl.load(p_first + i_own_high))
    b_first = gl.load(p_first + b_own)
    n_tiles = _uniform(n_tiles)
    fence_async_shared()
    b_query = s_queries.index(I_GROUP).load(gl.DotOperandLayout(0, PRODUCT, 2))
    s_scores = gl.allocate_shared_memory(gl.float32, [HALF, BLOCK_N], SWIZZLED)
    s_own_scores = reinterpret(s_scores, gl.float32, [4, WARP_ROWS, BLOCK_N], SWIZZLED)

    b_none = gl.zeros([HALF, BLOCK_N], gl.float32, PRODUCT)
    o_place = _places(BLOCK_N, TIE, SCORES)
    o_slot = gl.arange(0, SLOTS, gl.SliceLayout(0, PAIRS))
    # Slots past R hold +inf and are never the worst; empty ones fill from slot 0 on.
    b_best = gl.where((o_slot < R)[None, :], LOWEST, float("inf")) + gl.zeros([WARP_ROWS, SLOTS], gl.float32, PAIRS)
    b_index = (2 * TIE + SLOTS - o_slot).to(gl.float32)[None, :] + gl.zeros([WARP_ROWS, SLOTS], gl.float32, PAIRS)
    for i_tile in range(n_tiles):
        n_block = n_start + i_tile * BLOCK_N
        i_slot = i_tile % STAGES
        mbarrier.wait(full.index(i_slot), i_tile // STAGES & 1)
        b_product = warpgroup_mma(b_query, s_low.index(i_slot).permute((1, 0)), b_none, use_acc=False, is_async=True)
        b_product = warpgroup_mma(b_query, s_high.index(i_slot).permute((1, 0)), b_product, is_async=True)
        b_product = warpgroup_mma_wait(0, deps=[b_product])
        mbarrier.arrive(free.index(i_slot), count=1)
        s_scores.store(b_product)
        # (WARP_ROWS, BLOCK_N): from here on every warp is at its own rows.
        b_scores = s_own_scores.index(i_warp).load(SCORES)
        if (n_block < n_shared) | (n_block + BLOCK_N > i_own_low):
            o_block = n_block + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
            m_allowed = (o_block[None, :] >= b_first[:, None]) & (o_block[None, :] < b_own[:, None])
            b_scores = gl.where(m_allowed, b_scores, -float("inf"))
        b_worst = gl.convert_layout(gl.min(b_best, 1), gl.SliceLayout(1, SCORES), assert_trivial=True)
        b_better = gl.sum(_lane_sums(gl.where(b_scores > b_worst[:, None], 1.0, 0.0)), 1)
        n_rounds = _uniform(gl.minimum(gl.max(b_better, 0).to(gl.int32), R))
        b_best, b_index = _insert(b_scores, o_place, n_block.to(gl.float32) - TIE, b_best, b_index, n_rounds, TAKEN)

    s_own_pairs = reinterpret(s_scores, gl.float32, [8, WARP_ROWS, SLOTS], PLAIN)
    s_own_pairs.index(i_warp).store(b_best)
    s_own_pairs.index(i_warp + 4).store(b_index)
    s_pairs = reinterpret(s_scores, gl.float32, [2, HALF, SLOTS], PLAIN)
    _store_choices(
        p_first, p_of_token, p_choice, p_unsettled, s_pairs.index(0).load(PAIRS), s_pairs.index(1).load(PAIRS), n_row,
        n_start, i_kv, T, G, R, NONE, LOWEST, BLOCK_N,
    )  # fmt: skip


@gluon.jit
def _load_tiles(
    d_high, d_low, s_high, s_low, full, free, n_first, n_tiles, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
):
    """The copying warps: tiles of representatives, each as soon as its buffers are free."""
    n_tiles = _uniform(n_tiles)
    for i_tile in range(n_tiles):
        i_slot = i_tile % STAGES
        mbarrier.wait(free.index(i_slot), (i_tile // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(i_slot), 2 * d_high.block_type.nbytes)
        copy_tile(d_low, [n_first + i_tile * BLOCK_N, 0], full.index(i_slot), s_low.index(i_slot))
        copy_tile(d_high, [n_first + i_tile * BLOCK_N, 0], full.index(i_slot), s_high.index(i_slot))


@gluon.jit(do_not_specialize=NUMBERS)
def select_hopper_kernel(
    d_high,
    d_low,
    p_query,
    p_first,
    p_of_token,
    p_choice,
    p_unsettled,
    T,
    N,
    K,
    G: gl.constexpr,
    R: gl.constexpr,
    SLOTS: gl.constexpr,
    NONE: gl.constexpr,
    LOWEST: gl.constexpr,
    TAKEN: gl.constexpr,
    TIE: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    # The last rows have the most blocks to choose from: they start first.
    n_row = (gl.num_programs(0) - 1 - gl.program_id(0)) * ROWS
    i_kv = gl.program_id(1)
    n_start = gl.load(p_first + gl.load(p_of_token + n_row // G))
    n_stop = gl.load(p_of_token + gl.minimum(n_row + ROWS - 1, T * G - 1) // G)
    n_tiles = (n_stop - n_start + BLOCK_N - 1) // BLOCK_N

    TYPE: gl.constexpr = p_query.dtype.element_ty
    s_queries = gl.allocate_shared_memory(TYPE, [4, HALF, D], gl.NVMMASharedLayout.get_default_for([HALF, D], TYPE))
    s_high = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_N, D], d_high.layout)
    s_low = gl.allocate_shared_memory(TYPE, [STAGES, BLOCK_N, D], d_low.layout)
    full, free = barriers(1, STAGES), barriers(4, STAGES)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_choose, (
                p_query, p_first, p_of_token, p_choice, p_unsettled, s_queries, s_high, s_low, full, free, n_row,
                n_start, n_tiles, i_kv, T, K, 0, G, R, SLOTS, NONE, LOWEST, TAKEN, TIE, D, BLOCK_N, STAGES,
            )),
            (_choose, (
                p_query, p_first, p_of_token, p_choice, p_unsettled, s_queries, s_high, s_low, full, free, n_row,
                n_start, n_tiles, i_kv, T, K, 1, G, R, SLOTS, NONE, LOWEST, TAKEN, TIE, D, BLOCK_N, STAGES,
            )),
            (_choose, (
                p_query, p_first, p_of_token, p_choice, p_unsettled, s_queries, s_high, s_low, full, free, n_row,
                n_start, n_tiles, i_kv, T, K, 2, G, R, SLOTS, NONE, LOWEST, TAKEN, TIE, D, BLOCK_N, STAGES,
            )),
            (_choose, (
                p_query, p_first, p_of_token, p_choice, p_unsettled, s_queries, s_high, s_low, full, free, n_row,
                n_start, n_tiles, i_kv, T, K, 3, G, R, SLOTS, NONE, LOWEST, TAKEN, TIE, D, BLOCK_N, STAGES,
            )),
            (_load_tiles, (d_high, d_low, s_high, s_low, full, free, i_kv * N + n_start, n_tiles, BLOCK_N, STAGES)),
        ],
        [4, 4, 4, 4],
        [112, 112, 112, 24],
    )  # fmt: skip


def serves(query: Tensor, high: Tensor, blocks_of_tokens: int, choose: int, most_blocks: int) -> bool:
    """Whether this kernel is the faster one, and counts as far.

    Args:
        query: (T, H, D).
        high: (K, N, D).
        blocks_of_tokens: T // block_size; N is more by the number of segments.
        choose: R.
        most_blocks: that an index of the pairs can tell apart.
    """
    count, head_dim = high.shape[1:]
    long = blocks_of_tokens >= LONG_SEGMENT * max(1, count - blocks_of_tokens)
    return long and head_dim in HEAD_DIMS and choose <= MOST_CHOICES and count < most_blocks


def launch(query: Tensor, high: Tensor, low: Tensor, blocks: Blocks, choices: Tensor, **constants: Any) -> Tensor:
    """Fill in choices; (K, row tiles of HALF) int8: where the Triton kernel must start over."""
    tokens, heads, head_dim = query.shape
    kv_heads, count, _ = high.shape
    rows, choose = tokens * (heads // kv_heads), choices.shape[-1]
    unsettled = torch.empty(kv_heads, triton.cdiv(rows, HALF.value), dtype=torch.int8, device=query.device)
    tiles = (described(part.view(kv_heads * count, 1, head_dim), TILING.keys) for part in (high, low))
    select_hopper_kernel[(triton.cdiv(rows, TILING.rows), kv_heads)](
        *tiles, query, blocks.first, blocks.of_token, choices, unsettled, tokens, count, kv_heads,
        G=heads // kv_heads, R=choose, SLOTS=MOST_CHOICES, D=head_dim, BLOCK_N=TILING.keys,
        STAGES=TILING.stages, num_warps=TILING.warps, **constants,
    )  # fmt: skip
    return unsettled
