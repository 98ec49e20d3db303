"""From each query's choice of blocks to each block's list of queries.

A choice is one (token, query head, slot) that names a block; its *row* is token * H + head. The choices of one (block,
key/value head) form a list: their queries, of all heads in the group, read the same keys, so they are one dense matrix
product. Lists are padded to whole tiles where the dense pass wants tiles of equal size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routes:
    """Lists of rows, ordered by key/value head, then block, then row; one after the other, each padded to tiles.

    Attributes:
        rows: (P,) int64; the row of each place in the lists. Padding repeats row 0.
        padding: (P,) bool.
        lengths: (K, N) int64; real entries of each list.
        tiles: (K, N) int64; tiles of each list.
        places: (T * H, top_k - 1) int64; the place of each row's choices. Unused slots point to place 0.
        unused: (T * H, top_k - 1) bool; slots without a choice.
    """

    rows: Tensor
    padding: Tensor
    lengths: Tensor
    tiles: Tensor
    places: Tensor
    unused: Tensor


def route(choices: Tensor, kv_heads: int, blocks: int, tile: int) -> Routes | None:
    """Turn choices into lists, by a stable sort: the same choices always give the same order.

    Args:
        choices: (T, H, top_k - 1) integers, -1 where there is none.
        kv_heads: K.
        blocks: N.
        tile: rows of a tile; 1 for lists without padding.

    Returns:
        The lists, or None if nothing was chosen. The number of choices is read back to the host.
    """
    tokens, heads, slots = choices.shape
    device = choices.device
    base = torch.arange(kv_heads, dtype=torch.int32, device=device).repeat_interleave(heads // kv_heads) * blocks
    unused = choices < 0
    lists = torch.where(unused, kv_heads * blocks, choices + base[:, None]).flatten()  # unused ones sort last
    lists, order = lists.sort(stable=True)
    lengths = torch.bincount(lists, minlength=kv_heads * blocks + 1)[:-1]
    tiles = (lengths + tile - 1) // tile
    chosen, size = torch.stack((lengths.sum(), tiles.sum() * tile)).tolist()
    if chosen == 0:
        return None
    lists, order = lists[:chosen].long(), order[:chosen]
    shift = (tiles.cumsum(0) - tiles) * tile - (lengths.cumsum(0) - lengths)  # padding before each list
    place = torch.arange(chosen, device=device) + shift[lists]
    rows = torch.zeros(size, dtype=torch.long, device=device)
    rows[place] = order // slots
    padding = torch.ones(size, dtype=torch.bool, device=device)
    padding[place] = False
    places = torch.zeros(tokens * heads * slots, dtype=torch.long, device=device)
    places[order] = place
    return Routes(
        rows=rows,
        padding=padding,
        lengths=lengths.view(kv_heads, blocks),
        tiles=tiles.view(kv_heads, blocks),
        places=places.view(tokens * heads, slots),
        unused=unused.view(tokens * heads, slots),
    )
