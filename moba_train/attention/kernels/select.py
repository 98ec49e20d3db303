"""The best earlier blocks of every query, without a matrix of scores.

A program owns BLOCK_M rows of one kv head and streams over the representatives of the blocks they may choose from,
SELECT_BLOCKS at a time, in block order. It keeps the R best (score, block) pairs of each row. Of a tile of scores it
takes the best one of every row, and again, as often as the row with most scores above its worst pair asks for: after
the first tiles about three rounds. A new pair replaces the worst one only if it is strictly better, and of equal worst
ones the last: ties go to the earlier block. Tiles with rows in which equal scores of a tile counted, or scores that are
no numbers, start over in a slower loop. On Hopper ``hopper.select`` does up to 16 choices.

Work: 2 products of 2 x D operations for each (query, earlier block), and about 4 fp32 operations a score and round.
Bytes: queries once, representatives from L2, R small integers written a query.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_train.attention.blocks import Blocks
from moba_train.attention.kernels.call import on_hopper
from moba_train.attention.kernels.rows import NUMBERS, load_rows, row_offsets

SELECT_BLOCKS = 64
FAR = 1 << 30  # beyond every block index
LOWEST = -1.0e38  # at most every score
EMPTY = -2.0e38  # the score of no block
TAKEN = -3.0e38  # added to a score, makes it lower than EMPTY
TIE = 1 << 22  # counts the blocks that share a score, in a sum of their places


@triton.jit
def _scores(
    p_high, p_low, b_query, b_first, b_own, i_base, n_block, n_stop, LOWEST: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gate scores (BLOCK_M, BLOCK_N) of the blocks from n_block on; if MASKED, -inf where a row may not choose. If
    EXACT, what is not a number ranks last, above no block at all: every query gets as many blocks as its place says."""
    o_block = n_block + tl.arange(0, BLOCK_N)
    # (BLOCK_N, BLOCK_D) each
    b_high = load_rows(p_high, (i_base + o_block) * D, o_block < n_stop, D, BLOCK_D)
    b_low = load_rows(p_low, (i_base + o_block) * D, o_block < n_stop, D, BLOCK_D)
    b_scores = tl.dot(b_query, tl.trans(b_high), tl.dot(b_query, tl.trans(b_low)))
    if EXACT:
        b_scores = tl.maximum(b_scores, LOWEST)
    if MASKED:
        m_allowed = (o_block[None, :] >= b_first[:, None]) & (o_block[None, :] < b_own[:, None])
        b_scores = tl.where(m_allowed, b_scores, -float("inf"))
    return b_scores


@triton.jit
def _replace_worst(b_top, b_new, b_which, b_worst, b_best, b_index):
    """Put (b_new, b_which) in the place of each row's worst pair, where b_top is better; of equal worst pairs, the last
    block's."""
    m_worst = b_best == b_worst[:, None]
    b_last = tl.max(tl.where(m_worst, b_index, -1), 1)
    m_slot = m_worst & (b_index == b_last[:, None]) & (b_top > b_worst)[:, None]
    return tl.where(m_slot, b_new[:, None], b_best), tl.where(m_slot, b_which[:, None], b_index)


@triton.jit
def _insert_exactly(b_scores, n_block, b_best, b_index, n_rounds, FAR: tl.constexpr, BLOCK_N: tl.constexpr):
    """Carry the scores (BLOCK_M, BLOCK_N) of the blocks from n_block on into the best pairs (BLOCK_M, SLOTS): one block
    a row and round, the earliest of the best."""
    o_block = n_block + tl.arange(0, BLOCK_N)
    for _ in range(n_rounds):
        b_top = tl.max(b_scores, 1)
        b_which = tl.min(tl.where(b_scores == b_top[:, None], o_block[None, :], FAR), 1)
        b_best, b_index = _replace_worst(b_top, b_top, b_which, tl.min(b_best, 1), b_best, b_index)
        b_scores = tl.where(o_block[None, :] == b_which[:, None], -float("inf"), b_scores)
    return b_best, b_index


@triton.jit
def _insert_fast(
    b_scores, n_block, b_best, b_index, n_rounds, TAKEN: tl.constexpr, TIE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """``_insert_exactly`` where no two scores that count are equal. Where they are, an infinite one goes in: it stays.

    Comparisons run at half the rate of multiplications, and this loop is most of the kernel's time: so a block that is
    hit is named, counted and taken out, by multiplying."""
    o_place = tl.arange(0, BLOCK_N).to(tl.float32) + TIE
    for _ in range(n_rounds):
        b_top = tl.max(b_scores, 1)
        b_hit = (b_scores == b_top[:, None]).to(tl.float32)
        b_place = tl.sum(b_hit * o_place[None, :], 1)
        b_new = tl.where(b_place < 2 * TIE, b_top, float("inf"))
        b_which = n_block - TIE + b_place.to(tl.int32)
        b_worst = tl.min(b_best, 1)
        b_best, b_index = _replace_worst(b_top, b_new, b_which, b_worst, b_best, b_index)
        b_scores += b_hit * TAKEN
    return b_best, b_index


@triton.jit
def _unsettled(b_best, b_first, b_own, R: tl.constexpr, LOWEST: tl.constexpr, SLOTS: tl.constexpr):
    """Rows that the fast rounds cannot decide: an infinite score, or fewer scores than blocks to be chosen."""
    m_slot = (tl.arange(0, SLOTS) < R)[None, :]
    b_sure = tl.sum((m_slot & (b_best > LOWEST) & (b_best < float("inf"))).to(tl.int32), 1)
    return b_sure < tl.minimum(b_own - b_first, R)


@triton.jit
def _visit(
    p_high, p_low, b_query, b_first, b_own, i_base, n_from, n_to, n_stop, b_best, b_index, R: tl.constexpr,
    FAR: tl.constexpr, LOWEST: tl.constexpr, TAKEN: tl.constexpr, TIE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Carry the blocks n_from to n_to into the best pairs, a tile at a time."""
    for n_block in range(n_from, n_to, BLOCK_N):
        b_scores = _scores(
            p_high, p_low, b_query, b_first, b_own, i_base, n_block, n_stop, LOWEST, D, BLOCK_D, BLOCK_N, MASKED, EXACT
        )
        b_better = (b_scores > tl.min(b_best, 1)[:, None]).to(tl.float32)
        n_rounds = tl.minimum(tl.max(tl.sum(b_better, 1), 0).to(tl.int32), R)
        if n_rounds > 0:  # a branch of its own: a loop right inside this one would keep its loads from pipelining
            if EXACT:
                b_best, b_index = _insert_exactly(b_scores, n_block, b_best, b_index, n_rounds, FAR, BLOCK_N)
            else:
                b_best, b_index = _insert_fast(b_scores, n_block, b_best, b_index, n_rounds, TAKEN, TIE, BLOCK_N)
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
    EMPTY: tl.constexpr,
    TAKEN: tl.constexpr,
    TIE: tl.constexpr,
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
    b_no_best = tl.where((o_slot < R)[None, :], EMPTY, float("inf")) + tl.zeros([BLOCK_M, SLOTS], tl.float32)
    b_no_index = (FAR + SLOTS - o_slot)[None, :] + tl.zeros([BLOCK_M, SLOTS], tl.int32)
    b_best, b_index = b_no_best, b_no_index
    i_base = i_kv.to(tl.int64) * N
    b_best, b_index = _visit(
        p_high, p_low, b_query, b_first, b_own, i_base, n_start, n_edge, i_own_high, b_best, b_index, R, FAR,
        LOWEST, TAKEN, TIE, D, BLOCK_D, BLOCK_N, True, False,
    )  # fmt: skip
    b_best, b_index = _visit(
        p_high, p_low, b_query, b_first, b_own, i_base, n_edge, n_plain, i_own_high, b_best, b_index, R, FAR,
        LOWEST, TAKEN, TIE, D, BLOCK_D, BLOCK_N, False, False,
    )  # fmt: skip
    b_best, b_index = _visit(
        p_high, p_low, b_query, b_first, b_own, i_base, n_plain, i_own_high, i_own_high, b_best, b_index, R, FAR,
        LOWEST, TAKEN, TIE, D, BLOCK_D, BLOCK_N, True, False,
    )  # fmt: skip
    m_again = m_row & _unsettled(b_best, b_first, b_own, R, LOWEST, SLOTS)
    if tl.max(m_again.to(tl.int32), 0) > 0:  # in the way that keeps the order of equal scores
        b_best, b_index = _visit(
            p_high, p_low, b_query, b_first, b_own, i_base, n_start, i_own_high, i_own_high, b_no_best, b_no_index, R,
            FAR, LOWEST, TAKEN, TIE, D, BLOCK_D, BLOCK_N, True, True,
        )  # fmt: skip

    b_choice = tl.where(b_index < FAR, b_index - b_first[:, None], NONE)
    p_rows = p_choice + (i_kv.to(tl.int64) * T * G + o_row)[:, None] * R + o_slot[None, :]
    tl.store(p_rows, b_choice.to(p_choice.dtype.element_ty), mask=m_row[:, None] & (o_slot < R)[None, :])


def choice_type(tokens: int, block_size: int) -> torch.dtype:
    """The smallest integer type for a block's index in its segment; its largest value means no block."""
    most = (tokens - 1) // block_size  # earlier blocks of one query
    return torch.uint8 if most <= 255 else torch.int16 if most <= 32767 else torch.int32


def _tuned(query: Tensor, high: Tensor, low: Tensor, choose: int) -> Any:
    """``select`` of the package for Hopper, if it is there and serves these tensors."""
    package = on_hopper(query, high, low)
    return package.select if package is not None and package.select.serves(query, choose) else None


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
    tuned = _tuned(query, high, low, choose)
    if tuned is not None:
        tuned.launch(query, high, low, blocks, choices, NONE=torch.iinfo(dtype).max, LOWEST=LOWEST)
        return choices
    slots = triton.next_power_of_2(choose)
    # The pairs stay in registers; queries and two tiles of representatives in shared memory.
    rows, warps = (128, 8) if slots <= 32 and head_dim <= 128 else (64, 4) if slots <= 64 else (16, 4)
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
        EMPTY=EMPTY,
        TAKEN=TAKEN,
        TIE=TIE,
        D=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_M=rows,
        BLOCK_N=SELECT_BLOCKS,
        num_warps=warps,
        num_stages=2 if head_dim <= 128 else 1,
        # Two programs a multiprocessor, one multiplying while the other compares, where that costs few spills.
        maxnreg=128 if slots <= 16 and head_dim <= 128 else None,
    )
    return choices
