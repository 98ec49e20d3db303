"""Choices (by query) turned into lists of entries (by block), by counting, a prefix sum and a scatter.

The tokens are cut into P parts that are routed side by side; a program owns one part of one kv head. First it counts
how often each block is chosen. The prefix sum over (kv head, block, part), in that order, says where each part's
entries of each block go. Then the program walks through its entries ROUTE_ENTRIES at a time: an entry's rank among the
equal ones before it in the tile is found by comparing all pairs, and its place is the block's cursor plus that rank;
the last of its kind moves the cursor on. So a list holds its entries in ascending order whatever runs first: the order
in which dK and dV are summed, and their bits, never change. (The counts are made by integer atomics, whose sum has no
order.)

Work: ROUTE_ENTRIES comparisons an entry. Bytes: choices read twice, 4 bytes written an entry, and cursors from L2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_train.attention.blocks import Blocks
from moba_train.attention.kernels.rows import NUMBERS

COUNT_ENTRIES = 1024
ROUTE_ENTRIES = 64
ROUTE_WARPS = 1
ROUTE_PROGRAMS = 4096  # enough to fill a GPU with walks that mostly wait
MOST_CURSORS = 1 << 24  # 64 MiB


@dataclass(frozen=True)
class Lists:
    """Who chose each block, for some kv heads.

    Attributes:
        entries: (K * W * R,) int32; the entries e = w * R + r of each kv head, by (kv head, block), ascending.
        offsets: (kv_heads * N * P + 1,) int32; the list of kv head k and block n starts at ``offsets[(k * N + n) * P]``
            and the part of it whose queries lie in part p at ``offsets[(k * N + n) * P + p]``. Each list ends where
            the next one starts.
        blocks: N.
        parts: P.
        part_tokens: tokens of a part.
    """

    entries: Tensor
    offsets: Tensor
    blocks: int
    parts: int
    part_tokens: int

    def of(self, kv_start: int, kv_heads: int) -> Lists:
        """The lists of some kv heads."""
        step = self.blocks * self.parts
        return replace(self, offsets=self.offsets[kv_start * step : (kv_start + kv_heads) * step + 1])


def parts_of(tokens: int, kv_heads: int, per_token: int, blocks: int) -> tuple[int, int]:
    """(P, tokens of a part).

    Args:
        per_token: entries of a token and kv head.
        blocks: N.
    """
    parts = min(
        triton.cdiv(ROUTE_PROGRAMS, kv_heads),
        triton.cdiv(tokens * per_token, COUNT_ENTRIES),
        max(1, MOST_CURSORS // (kv_heads * blocks)),
    )
    part_tokens = triton.cdiv(tokens, parts)
    return triton.cdiv(tokens, part_tokens), part_tokens


@triton.jit
def _load_blocks(p_choice, p_first, p_of_token, o_entry, n_stop, GR: tl.constexpr, NONE: tl.constexpr):
    """The block of each entry, counted over all segments; -1 where it names none or lies past n_stop."""
    m_entry = o_entry < n_stop
    b_choice = tl.load(p_choice + o_entry, mask=m_entry, other=NONE).to(tl.int32)
    b_own = tl.load(p_of_token + o_entry // GR, mask=m_entry, other=0)
    b_first = tl.load(p_first + b_own, mask=m_entry, other=0)
    return tl.where(b_choice == NONE, -1, b_first + b_choice)


@triton.jit(do_not_specialize=NUMBERS)
def _count_kernel(
    p_choice,
    p_first,
    p_of_token,
    p_count,
    W,
    N,
    P,
    n_part,
    R: tl.constexpr,
    GR: tl.constexpr,
    NONE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    i_part, i_kv = tl.program_id(0), tl.program_id(1)
    p_choice += i_kv.to(tl.int64) * W * R
    p_count += i_kv.to(tl.int64) * N * P + i_part
    n_stop = tl.minimum((i_part + 1) * n_part, W * R)
    for n_entry in range(i_part * n_part, n_stop, BLOCK_E):
        # (BLOCK_E,)
        o_entry = n_entry + tl.arange(0, BLOCK_E)
        b_block = _load_blocks(p_choice, p_first, p_of_token, o_entry, n_stop, GR, NONE)
        tl.atomic_add(p_count + b_block.to(tl.int64) * P, 1, mask=b_block >= 0, sem="relaxed")


@triton.jit(do_not_specialize=NUMBERS)
def _scatter_kernel(
    p_choice,
    p_first,
    p_of_token,
    p_cursor,
    p_entry,
    W,
    N,
    P,
    n_part,
    R: tl.constexpr,
    GR: tl.constexpr,
    NONE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    i_part, i_kv = tl.program_id(0), tl.program_id(1)
    p_choice += i_kv.to(tl.int64) * W * R
    p_cursor += i_kv.to(tl.int64) * N * P + i_part
    n_stop = tl.minimum((i_part + 1) * n_part, W * R)
    o_place = tl.arange(0, BLOCK_E)
    # (BLOCK_E,)
    b_block = _load_blocks(p_choice, p_first, p_of_token, i_part * n_part + o_place, n_stop, GR, NONE)
    for n_entry in range(i_part * n_part, n_stop, BLOCK_E):
        o_entry = n_entry + o_place
        # The next tile's blocks, on their way while this one's are ranked.
        b_ahead = _load_blocks(p_choice, p_first, p_of_token, o_entry + BLOCK_E, n_stop, GR, NONE)
        # Equal entries before this one in the low half, itself and those after it in the high half.
        b_weight = tl.where(o_place[None, :] < o_place[:, None], 1, 1 << 16)
        b_equal = tl.sum(tl.where(b_block[:, None] == b_block[None, :], b_weight, 0), 1)
        b_rank = b_equal & 0xFFFF
        p_own = p_cursor + b_block.to(tl.int64) * P
        # Other threads of this program moved the cursors in the tile before: read them from L2, between barriers.
        b_cursor = tl.load(p_own, mask=b_block >= 0, other=0, volatile=True)
        tl.debug_barrier()
        tl.store(p_entry + b_cursor + b_rank, o_entry, mask=b_block >= 0)
        tl.store(p_own, b_cursor + b_rank + 1, mask=(b_block >= 0) & (b_equal >> 16 == 1))
        tl.debug_barrier()
        b_block = b_ahead


def route(choices: Tensor, blocks: Blocks) -> Lists:
    """Make the lists.

    Args:
        choices: (K, T, G, R), contiguous, as ``select`` gives them.
        blocks: of the segments.
    """
    kv_heads, tokens, group, choose = choices.shape
    device, count = choices.device, len(blocks.first)
    per_token = group * choose
    parts, part_tokens = parts_of(tokens, kv_heads, per_token, count)
    sizes = dict(R=choose, GR=per_token, NONE=torch.iinfo(choices.dtype).max)
    arguments = (tokens * group, count, parts, part_tokens * per_token)

    counts = torch.zeros(kv_heads * count * parts, dtype=torch.int32, device=device)
    _count_kernel[(parts, kv_heads)](
        choices, blocks.first, blocks.of_token, counts, *arguments, **sizes, BLOCK_E=COUNT_ENTRIES
    )
    offsets = torch.zeros(len(counts) + 1, dtype=torch.int32, device=device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=offsets[1:])
    entries = torch.empty(kv_heads * tokens * per_token, dtype=torch.int32, device=device)
    cursors = offsets[:-1].clone()
    _scatter_kernel[(parts, kv_heads)](
        choices,
        blocks.first,
        blocks.of_token,
        cursors,
        entries,
        *arguments,
        **sizes,
        BLOCK_E=ROUTE_ENTRIES,
        num_warps=ROUTE_WARPS,
    )
    return Lists(entries=entries, offsets=offsets, blocks=count, parts=parts, part_tokens=part_tokens)


@dataclass(frozen=True)
class Tiles:
    """Lists cut into tiles of ``rows`` entries, for the queries of some parts.

    Attributes:
        of_list: (kv_heads * N + 1,) int32; the tiles of list i are ``of_list[i]:of_list[i + 1]``.
        lists: (most,) int32; the list of each tile, kv_heads * N past the last one. ``most`` is a bound that holds
            whatever was chosen, so nothing is read back to the host.
    """

    of_list: Tensor
    lists: Tensor


def tile(lists: Lists, kv_heads: int, part_start: int, part_stop: int, entries: int, rows: int) -> Tiles:
    """Cut the parts ``part_start:part_stop`` of every list into tiles; they hold at most ``entries`` entries."""
    bounds = lists.offsets[:-1].view(-1, lists.parts)
    starts = bounds[:, part_start]
    stops = lists.offsets[part_stop :: lists.parts][: len(starts)]
    of_list = torch.zeros(len(starts) + 1, dtype=torch.int32, device=starts.device)
    torch.cumsum((stops - starts + (rows - 1)) // rows, 0, dtype=torch.int32, out=of_list[1:])
    most = triton.cdiv(entries, rows) + len(starts)
    index = torch.arange(most, dtype=torch.int32, device=starts.device)
    return Tiles(of_list=of_list, lists=torch.searchsorted(of_list[1:], index, right=True, out_int32=True))
