"""The best earlier blocks of every query, without a matrix of scores.

A program owns BLOCK_M rows of one kv head and streams over the representatives of the blocks they may choose from,
SELECT_BLOCKS at a time, in block order. It keeps the R best (score, block) pairs of each row. Of a tile of scores it
takes the best one of every row, and again, as often as the row with most scores above its worst pair asks for: after
the first tiles about three rounds. A new pair replaces the worst one only if it is strictly better, and of equal worst
ones the last: ties go to the earlier block.

Work: 2 products of 2 x D operations for each (query, earlier block), and about 10 fp32 operations on each score.
Bytes: queries once, representatives from L2, R small integers written a query.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_train.attention.blocks import Blocks
from moba_train.attention.kernels.rows import NUMBERS, load_rows, row_offsets

SELECT_BLOCKS = 64
FAR = 1 << 30  # beyond every block index
LOWEST = -3.0e38  # below every score, above -inf


@triton.jit
def _scores(
    p_high,
    p_low,
    b_query,
    i_base,
    n_block,
    n_stop,
    LOWEST: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gate scores (BLOCK_M, BLOCK_N) of the blocks from n_block on; 0 from n_stop on. A score that is not a number
    ranks last, above no block at all: every query gets as many blocks as its place in the segment says."""
    o_block = n_block + tl.arange(0, BLOCK_N)
    # (BLOCK_N, BLOCK_D) each
    b_high = load_rows(p_high, (i_base + o_block) * D, o_block < n_stop, D, BLOCK_D)
    b_low = load_rows(p_low, (i_base + o_block) * D, o_block < n_stop, D, BLOCK_D)
    return tl.maximum(tl.dot(b_query, tl.trans(b_high), tl.dot(b_query, tl.trans(b_low))), LOWEST)


@triton.jit
def _insert(b_scores, o_block, b_best, b_index, R: tl.constexpr, FAR: tl.constexpr):
    """Carry the scores (BLOCK_M, BLOCK_N) of blocks o_block into the best pairs (BLOCK_M, SLOTS)."""
    b_worst = tl.min(b_best, 1)
    n_rounds = tl.max(tl.sum((b_scores > b_worst[:, None]).to(tl.int32), 1), 0)
    if (
        n_rounds > 0
    ):  # a branch of its own: a loop right inside the caller's would keep that one's loads from pipelining
        for _ in range(tl.minimum(n_rounds, R)):
            b_top = tl.max(b_scores, 1)
            b_which = tl.min(tl.where(b_scores == b_top[:, None], o_block[None, :], FAR), 1)
            b_scores = tl.where(o_block[None, :] == b_which[:, None], -float("inf"), b_scores)
            m_worst = b_best == b_worst[:, None]
            b_last = tl.max(tl.where(m_worst, b_index, -1), 1)
            m_slot = m_worst & (b_index == b_last[:, None]) & (b_top > b_worst)[:, None]
            b_best = tl.where(m_slot, b_top[:, None], b_best)
            b_index = tl.where(m_slot, b_which[:, None], b_index)
            b_worst = tl.min(b_best, 1)
    return b_best, b_index


@triton.jit(do_not_specialize=NUMBERS)
def _select_kernel(
    p_query,
    p_high,
    p_low,
    p_first,
    p_of_token,
    p_choice,
    T,
    N,
    K,
    G: tl.constexpr,
    R: tl.constexpr,
    SLOTS: tl.constexpr,
    NONE: tl.constexpr,
    FAR: tl.constexpr,
    LOWEST: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The last rows have the most blocks to choose from: they start first.
    i_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    i_kv = tl.program_id(1)
    o_row = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_row < T * G
    # (BLOCK_M,) own block and first block of each row's segment
    b_own = tl.load(p_of_token + o_row // G, mask=m_row, other=0)
    b_first = tl.load(p_first + b_own, mask=m_row, other=0)
    # (BLOCK_M, BLOCK_D)
    b_query = load_rows(p_query, row_offsets(o_row, i_kv, K, G, D), m_row, D, BLOCK_D)

    i_own_low = tl.load(p_of_token + i_tile * BLOCK_M // G)
    i_own_high = tl.load(p_of_token + tl.minimum((i_tile * BLOCK_M + BLOCK_M - 1) // G, T - 1))
    n_start = tl.load(p_first + i_own_low)
    # From n_shared to i_own_low every row of the tile may choose every block: no mask there.
    n_shared = tl.load(p_first + i_own_high)
    n_edge = n_start + tl.cdiv(n_shared - n_start, BLOCK_N) * BLOCK_N
    n_plain = n_edge + tl.maximum(i_own_low - n_edge, 0) // BLOCK_N * BLOCK_N

    o_slot = tl.arange(0, SLOTS)
    # Slots past R hold +inf and are never the worst; empty ones fill from slot 0 on.
    b_best = tl.where((o_slot < R)[None, :], -float("inf"), float("inf")) + tl.zeros([BLOCK_M, SLOTS], tl.float32)
    b_index = (FAR + SLOTS - o_slot)[None, :] + tl.zeros([BLOCK_M, SLOTS], tl.int32)
    i_base = i_kv.to(tl.int64) * N
    for n_block in range(n_start, n_edge, BLOCK_N):
        o_block = n_block + tl.arange(0, BLOCK_N)
        b_scores = _scores(p_high, p_low, b_query, i_base, n_block, i_own_high, LOWEST, D, BLOCK_D, BLOCK_N)
        m_allowed = (o_block[None, :] >= b_first[:, None]) & (o_block[None, :] < b_own[:, None])
        b_best, b_index = _insert(tl.where(m_allowed, b_scores, -float("inf")), o_block, b_best, b_index, R, FAR)
    for n_block in range(n_edge, n_plain, BLOCK_N):
        o_block = n_block + tl.arange(0, BLOCK_N)
        b_scores = _scores(p_high, p_low, b_query, i_base, n_block, i_own_high, LOWEST, D, BLOCK_D, BLOCK_N)
        b_best, b_index = _insert(b_scores, o_block, b_best, b_index, R, FAR)
    for n_block in range(n_plain, i_own_high, BLOCK_N):
        o_block = n_block + tl.arange(0, BLOCK_N)
        b_scores = _scores(p_high, p_low, b_query, i_base, n_block, i_own_high, LOWEST, D, BLOCK_D, BLOCK_N)
        m_allowed = (o_block[None, :] >= b_first[:, None]) & (o_block[None, :] < b_own[:, None])
        b_best, b_index = _insert(tl.where(m_allowed, b_scores, -float("inf")), o_block, b_best, b_index, R, FAR)

    b_choice = tl.where(b_index < FAR, b_index - b_first[:, None], NONE)
    p_rows = p_choice + (i_kv.to(tl.int64) * T * G + o_row)[:, None] * R + o_slot[None, :]
    tl.store(p_rows, b_choice.to(p_choice.dtype.element_ty), mask=m_row[:, None] & (o_slot < R)[None, :])


def choice_type(tokens: int, block_size: int) -> torch.dtype:
    """The smallest integer type for a block's index in its segment; its largest value means no block."""
    most = (tokens - 1) // block_size  # earlier blocks of one query
    return torch.uint8 if most <= 255 else torch.int16 if most <= 32767 else torch.int32


def select(query: Tensor, high: Tensor, low: Tensor, blocks: Blocks, block_size: int, choose: int) -> Tensor:
    """Choose the ``choose`` best earlier blocks of every query.

    Args:
        query: (T, H, D), contiguous.
        high, low: representatives, (K, N, D) each.
        blocks: of the segments.
        block_size: B, which bounds a segment's blocks.
        choose: R, at least 1.

    Returns:
        (K, T, G, R) of ``choice_type``: indices of blocks counted from the segment's first, in no particular order;
        the type's largest value in the last places where a query has fewer earlier blocks.
    """
    tokens, heads, head_dim = query.shape
    kv_heads, count, _ = high.shape
    group = heads // kv_heads
    dtype = choice_type(tokens, block_size)
    choices = torch.empty(kv_heads, tokens, group, choose, dtype=dtype, device=query.device)
    slots = triton.next_power_of_2(choose)
    rows, warps = (128, 8) if slots <= 32 else (64, 4) if slots <= 64 else (16, 4)  # the pairs stay in registers
    _select_kernel[(triton.cdiv(tokens * group, rows), kv_heads)](
        query,
        high,
        low,
        blocks.first,
        blocks.of_token,
        choices,
        tokens,
        count,
        kv_heads,
        G=group,
        R=choose,
        SLOTS=slots,
        NONE=torch.iinfo(dtype).max,
        FAR=FAR,
        LOWEST=LOWEST,
        D=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_M=rows,
        BLOCK_N=SELECT_BLOCKS,
        num_warps=warps,
        num_stages=2,
    )
    return choices
