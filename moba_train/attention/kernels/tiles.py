"""Lists cut into tiles, by which the kernels that own one tile find their work.

Work: a few dozen operations a list, and a binary search a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_train.attention.kernels.lists import Lists
from moba_train.attention.kernels.rows import NUMBERS

TILE_LISTS = 4096
TILE_WARPS = 8
FIND_TILES = 1024


@dataclass(frozen=True)
class Tiles:
    """Lists cut into tiles of ``rows`` entries, for the queries of some parts.

    Attributes:
        of_list: (kv_heads * N + 2,) int32; the tiles of list i are ``of_list[i]:of_list[i + 1]``. Last a mark, not set.
        lists: (most,) int32; the list of each tile, kv_heads * N past the last one. ``most`` is a bound that holds
            whatever was chosen, so nothing is read back to the host.
    """

    of_list: Tensor
    lists: Tensor


@triton.jit
def _count_tiles(p_offset, o_list, LISTS, N, P, i_part, n_parts, ROWS: tl.constexpr):
    """Tiles of each list; none of those past the last."""
    p_start = p_offset + ((o_list // N).to(tl.int64) * (P + 1) + i_part) * N + o_list % N
    b_start = tl.load(p_start, mask=o_list < LISTS, other=0)
    b_stop = tl.load(p_start + n_parts.to(tl.int64) * N, mask=o_list < LISTS, other=0)
    return (b_stop - b_start + ROWS - 1) // ROWS


@triton.jit(do_not_specialize=NUMBERS)
def _tile_lists_kernel(p_offset, p_of_list, LISTS, N, P, i_part, n_parts, ROWS: tl.constexpr, BLOCK_L: tl.constexpr):
    """A program owns BLOCK_L lists. It counts the tiles of all earlier ones itself."""
    o_list = tl.arange(0, BLOCK_L)
    n_list = tl.program_id(0) * BLOCK_L
    b_earlier = tl.zeros([BLOCK_L], tl.int32)
    for n_earlier in range(0, n_list, BLOCK_L):
        b_earlier += _count_tiles(p_offset, n_earlier + o_list, LISTS, N, P, i_part, n_parts, ROWS)
    b_tiles = _count_tiles(p_offset, n_list + o_list, LISTS, N, P, i_part, n_parts, ROWS)
    b_stop = tl.sum(b_earlier, 0) + tl.cumsum(b_tiles, 0)
    b_start = tl.where(n_list + o_list <= LISTS, b_stop - b_tiles, 0)
    tl.store(p_of_list + n_list + o_list, b_start, mask=n_list + o_list <= LISTS + 1)


@triton.jit(do_not_specialize=NUMBERS)
def _find_lists_kernel(p_of_list, p_list, LISTS, n_tiles, STEPS: tl.constexpr, BLOCK_T: tl.constexpr):
    """A program owns BLOCK_T tiles: the last list that starts at or before each; LISTS past the last tile."""
    o_tile = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    b_low = tl.zeros([BLOCK_T], tl.int32)
    b_high = b_low + LISTS
    for _ in range(STEPS):
        b_middle = (b_low + b_high + 1) // 2
        m_before = tl.load(p_of_list + b_middle) <= o_tile
        b_low = tl.where(m_before, b_middle, b_low)
        b_high = tl.where(m_before, b_high, b_middle - 1)
    tl.store(p_list + o_tile, b_low, mask=o_tile < n_tiles)


def tile(lists: Lists, part_start: int, part_stop: int, entries: int, rows: int) -> Tiles:
    """Cut the parts ``part_start:part_stop`` of every list into tiles; they hold at most ``entries`` entries."""
    kv_heads, _, blocks = lists.offsets.shape
    count = kv_heads * blocks
    most = triton.cdiv(entries, rows) + count
    of_list, list_of_tile = (
        torch.empty(size, dtype=torch.int32, device=lists.offsets.device) for size in (count + 2, most)
    )
    _tile_lists_kernel[(triton.cdiv(count + 2, TILE_LISTS),)](
        lists.offsets, of_list, count, blocks, lists.parts, part_start, part_stop - part_start, ROWS=rows,
        BLOCK_L=TILE_LISTS, num_warps=TILE_WARPS,
    )  # fmt: skip
    _find_lists_kernel[(triton.cdiv(most, FIND_TILES),)](
        of_list, list_of_tile, count, most, STEPS=count.bit_length(), BLOCK_T=FIND_TILES
    )
    return Tiles(of_list, list_of_tile)
