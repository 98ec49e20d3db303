"""Choices (by query) turned into lists of entries (by block), by counting, a prefix sum and a scatter.

The tokens are cut into P parts that are routed side by side.

rank     a program owns one part of one kv head and N counters, which only it touches. It walks through its entries
         RANK_ENTRIES at a time: an entry's rank among the part's entries of its block is the block's counter plus the
         number of equal entries before it in the tile, found by comparing all pairs; the last of its kind moves the
         counter on. Work: RANK_ENTRIES comparisons an entry. Bytes: choices read, ranks of 2 bytes written.
place    the prefix sums of the counters over (block, part) of a kv head: where each part's entries of each block go.
         A program owns some blocks of all parts; ``total`` has counted the entries of the blocks before them.
scatter  an entry's place is its part's and block's plus its rank. Entries know their places without waiting for each
         other, and programs run in the order of the kv heads: those whose lists are being written fit the L2, which
         the 4 bytes of an entry would otherwise leave as a sector of 32. Bytes: choices and ranks read, 4 written.

On Hopper ``hopper.route`` stands in for the first and the last, if it has room for a part.

So a list holds its entries in ascending order whatever runs first: the order in which dK and dV are summed, and their
bits, never change.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_train.attention.blocks import Blocks
from moba_train.attention.kernels.call import is_hopper, on_hopper
from moba_train.attention.kernels.lists import Lists
from moba_train.attention.kernels.plan import sorting
from moba_train.attention.kernels.rows import NUMBERS

RANK_ENTRIES = 32
RANK_PROGRAMS = 3072  # enough to fill a GPU with walks of one warp
PART_ENTRIES = 512  # at least, of a walk
MOST_COUNTERS = 1 << 23  # 16 MiB, 128 KiB a multiprocessor: a walk's stay in L1
SORT_PROGRAMS = 2048  # of parts that are sorted: the longer one is, the longer the runs of entries that it writes
SORT_ENTRIES = 4096  # at least, of a part that is sorted
PLACE_BLOCKS = 32
PLACE_PARTS = 128
PLACE_TOTALS = 1024
PLACE_WARPS = 8
SCATTER_ENTRIES = 2048
SCATTER_WARPS = 8
SHORT_COUNTS = 1 << 16  # counters and ranks below it take 2 bytes


def parts_of(tokens: int, kv_heads: int, per_token: int, blocks: int, device: torch.device) -> tuple[int, int]:
    """(P, tokens of a part).

    Args:
        per_token: entries of a token and kv head.
        blocks: N.
        device: where the lists are made.
    """
    room = sorting(blocks)[2] - per_token if is_hopper(device) else 0
    entries = tokens * per_token
    if room > per_token:
        parts = min(triton.cdiv(SORT_PROGRAMS, kv_heads), triton.cdiv(entries, SORT_ENTRIES))
        parts = max(parts, triton.cdiv(entries, room))
    else:
        most = max(1, MOST_COUNTERS // (kv_heads * blocks))
        parts = min(triton.cdiv(RANK_PROGRAMS, kv_heads), triton.cdiv(entries, PART_ENTRIES), most)
    part_tokens = triton.cdiv(tokens, parts)
    return triton.cdiv(tokens, part_tokens), part_tokens


@triton.jit
def _load_choices(p_choice, p_of_token, o_entry, n_stop, GR: tl.constexpr, NONE: tl.constexpr):
    """Each entry's choice and own block; NONE past n_stop."""
    m_entry = o_entry < n_stop
    b_choice = tl.load(p_choice + o_entry, mask=m_entry, other=NONE)
    return b_choice, tl.load(p_of_token + o_entry // GR, mask=m_entry, other=0)


@triton.jit
def _named_blocks(p_first, b_choice, b_own, NONE: tl.constexpr):
    """The block that each choice names, counted over all segments; -1 where it names none."""
    return tl.where(b_choice == NONE, -1, tl.load(p_first + b_own) + b_choice)


@triton.jit(do_not_specialize=NUMBERS)
def _rank_kernel(
    p_choice,
    p_first,
    p_of_token,
    p_count,
    p_rank,
    W,
    N,
    P,
    n_part,
    R: tl.constexpr,
    GR: tl.constexpr,
    NONE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_part, i_kv = tl.program_id(0), tl.program_id(1)
    p_choice += i_kv.to(tl.int64) * W * R
    p_rank += i_kv.to(tl.int64) * W * R
    p_count += (i_kv.to(tl.int64) * P + i_part) * N
    o_block = tl.arange(0, BLOCK_N)
    for n_block in range(0, N, BLOCK_N):
        tl.store(p_count + n_block + o_block, tl.zeros([BLOCK_N], tl.int32), mask=n_block + o_block < N)
    tl.debug_barrier()
    n_stop = tl.minimum((i_part + 1) * n_part, W * R)
    o_place = tl.arange(0, BLOCK_E)
    # (BLOCK_E,)
    b_choice, b_own = _load_choices(p_choice, p_of_token, i_part * n_part + o_place, n_stop, GR, NONE)
    b_block = _named_blocks(p_first, b_choice, b_own, NONE)
    b_choice, b_own = _load_choices(p_choice, p_of_token, i_part * n_part + BLOCK_E + o_place, n_stop, GR, NONE)
    for n_entry in range(i_part * n_part, n_stop, BLOCK_E):
        o_entry = n_entry + o_place
        # The next tile's blocks, and what they are made of one tile later: on their way while this tile is ranked.
        b_ahead = _named_blocks(p_first, b_choice, b_own, NONE)
        b_choice, b_own = _load_choices(p_choice, p_of_token, o_entry + 2 * BLOCK_E, n_stop, GR, NONE)
        # Equal entries before this one in the low half, itself and those after it in the high half.
        b_weight = tl.where(o_place[:, None] < o_place[None, :], 1, 1 << 16)
        b_equal = tl.sum(tl.where(b_block[:, None] == b_block[None, :], b_weight, 0), 0)
        # Threads of this program moved the counters in the tile before, and will below: barriers keep them apart.
        b_rank = (b_equal & 0xFFFF) + tl.load(p_count + b_block, mask=b_block >= 0, other=0).to(tl.int32)
        tl.debug_barrier()
        tl.store(p_rank + o_entry, b_rank, mask=o_entry < n_stop)
        tl.store(p_count + b_block, b_rank + 1, mask=(b_block >= 0) & (b_equal >> 16 == 1))
        tl.debug_barrier()
        b_block = b_ahead


@triton.jit
def _load_counts(p_count, n_part, o_block, N, P, BLOCK_P: tl.constexpr):
    """(BLOCK_P, blocks) counters of a kv head from part n_part on, and their offsets and mask."""
    o_part = n_part + tl.arange(0, BLOCK_P)
    o_count = o_part[:, None] * N + o_block[None, :]
    m_count = (o_part < P)[:, None] & (o_block < N)[None, :]
    return tl.load(p_count + o_count, mask=m_count, other=0).to(tl.int32), o_count, m_count


@triton.jit(do_not_specialize=NUMBERS)
def _total_kernel(p_count, p_total, N, P, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    i_kv = tl.program_id(1).to(tl.int64)
    o_block = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_total = tl.zeros([BLOCK_N], tl.int32)
    for n_part in range(0, P, BLOCK_P):
        b_count, _, _ = _load_counts(p_count + i_kv * P * N, n_part, o_block, N, P, BLOCK_P)
        b_total += tl.sum(b_count, 0)
    tl.store(p_total + i_kv * N + o_block, b_total, mask=o_block < N)


@triton.jit(do_not_specialize=NUMBERS)
def _place_kernel(
    p_count, p_total, p_offset, W, N, P, R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    n_block, i_kv = tl.program_id(0) * BLOCK_N, tl.program_id(1).to(tl.int64)
    p_total += i_kv * N
    p_offset += i_kv * (P + 1) * N
    b_earlier = tl.zeros([BLOCK_T], tl.int32)
    for n_earlier in range(0, n_block, BLOCK_T):
        o_earlier = n_earlier + tl.arange(0, BLOCK_T)
        b_earlier += tl.load(p_total + o_earlier, mask=o_earlier < n_block, other=0)
    o_block = n_block + tl.arange(0, BLOCK_N)
    b_total = tl.load(p_total + o_block, mask=o_block < N, other=0)
    b_offset = (i_kv * W * R).to(tl.int32) + tl.sum(b_earlier, 0) + tl.cumsum(b_total, 0) - b_total
    for n_part in range(0, P, BLOCK_P):
        b_count, o_count, m_count = _load_counts(p_count + i_kv * P * N, n_part, o_block, N, P, BLOCK_P)
        tl.store(p_offset + o_count, b_offset[None, :] + tl.cumsum(b_count, 0) - b_count, mask=m_count)
        b_offset += tl.sum(b_count, 0)
    tl.store(p_offset + P.to(tl.int64) * N + o_block, b_offset, mask=o_block < N)


@triton.jit(do_not_specialize=NUMBERS)
def _scatter_kernel(
    p_choice,
    p_first,
    p_of_token,
    p_offset,
    p_rank,
    p_entry,
    W,
    N,
    P,
    n_part,
    n_tiles,
    R: tl.constexpr,
    GR: tl.constexpr,
    NONE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    i_part, i_kv = tl.program_id(0) // n_tiles, tl.program_id(1)
    p_choice += i_kv.to(tl.int64) * W * R
    p_rank += i_kv.to(tl.int64) * W * R
    p_offset += (i_kv.to(tl.int64) * (P + 1) + i_part) * N
    n_stop = tl.minimum((i_part + 1) * n_part, W * R)
    # (BLOCK_E,)
    o_entry = i_part * n_part + tl.program_id(0) % n_tiles * BLOCK_E + tl.arange(0, BLOCK_E)
    b_rank = tl.load(p_rank + o_entry, mask=o_entry < n_stop, other=0).to(tl.int32)
    b_choice, b_own = _load_choices(p_choice, p_of_token, o_entry, n_stop, GR, NONE)
    b_block = _named_blocks(p_first, b_choice, b_own, NONE)
    b_offset = tl.load(p_offset + b_block, mask=b_block >= 0, other=0)
    tl.store(p_entry + b_offset + b_rank, o_entry, mask=b_block >= 0)


def _sum_up(counts: Tensor, rows: int, choose: int) -> Tensor:
    """The offsets of ``Lists`` that the counters (K, P, N) make."""
    kv_heads, parts, count = counts.shape
    offsets, totals = (
        torch.empty(kv_heads, *shape, dtype=torch.int32, device=counts.device)
        for shape in ((parts + 1, count), (count,))
    )
    columns = dict(BLOCK_N=PLACE_BLOCKS, BLOCK_P=PLACE_PARTS, num_warps=PLACE_WARPS)
    grid = (triton.cdiv(count, PLACE_BLOCKS), kv_heads)
    _total_kernel[grid](counts, totals, count, parts, **columns)
    _place_kernel[grid](counts, totals, offsets, rows, count, parts, R=choose, BLOCK_T=PLACE_TOTALS, **columns)
    return offsets


def _tuned(choices: Tensor, blocks: int, entries: int) -> Any:
    """``route`` of the package for Hopper, if it is there and serves N blocks and a part's entries."""
    package = on_hopper(choices)
    return package.route if package is not None and package.route.serves(blocks, entries) else None


def route(choices: Tensor, blocks: Blocks) -> Lists:
    """Make the lists.

    Args:
        choices: (K, T, G, R), contiguous, as ``select`` gives them: a query names a block once.
        blocks: of the segments.
    """
    kv_heads, tokens, group, choose = choices.shape
    device, count = choices.device, len(blocks.first)
    per_token = group * choose
    parts, part_tokens = parts_of(tokens, kv_heads, per_token, count, device)
    sizes = dict(R=choose, GR=per_token, NONE=torch.iinfo(choices.dtype).max)
    numbers = (tokens * group, count, parts, part_tokens * per_token)
    named, tuned = (choices, blocks.first, blocks.of_token), _tuned(choices, count, part_tokens * per_token)

    count_type = torch.uint16 if part_tokens * group < SHORT_COUNTS else torch.int32
    counts = torch.empty(kv_heads, parts, count, dtype=count_type, device=device)
    if tuned is not None:
        tuned.count(choices, blocks, counts, *numbers, **sizes)
    else:
        ranks = torch.empty(kv_heads, tokens * per_token, dtype=count_type, device=device)
        _rank_kernel[(parts, kv_heads)](
            *named, counts, ranks, *numbers, **sizes, BLOCK_E=RANK_ENTRIES, BLOCK_N=256, num_warps=1
        )
    offsets = _sum_up(counts, tokens * group, choose)
    entries = torch.empty(kv_heads * tokens * per_token, dtype=torch.int32, device=device)
    if tuned is not None:
        tuned.fill(choices, blocks, offsets, entries, *numbers, **sizes)
    else:
        tiles = triton.cdiv(part_tokens * per_token, SCATTER_ENTRIES)
        _scatter_kernel[(parts * tiles, kv_heads)](
            *named, offsets, ranks, entries, *numbers, tiles, **sizes, BLOCK_E=SCATTER_ENTRIES, num_warps=SCATTER_WARPS
        )
    return Lists(entries, offsets, part_tokens)
