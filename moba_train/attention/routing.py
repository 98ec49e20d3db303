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
        rows: (P,) int64; the row of each place in the lists. Padding repeats its list's first row, so that no list
            ever touches a row that is not its own.
        padding: (P,) bool.
        lengths: (K, N) int64; real entries of each list.
        tiles: (K, N) int64; tiles of each list.
        places: (T * H, top_k - 1) int64; the place of each row's choices. Slots without a choice have place P, where
            a pass puts the empty result: output and gradient 0, log-sum-exp -inf.
    """

    rows: Tensor
    padding: Tensor
    lengths: Tensor
    tiles: Tensor
    places: Tensor


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
    lists = torch.where(choices < 0, kv_heads * blocks, choices + base[:, None]).flatten()  # no choice sorts last
    lists, order = lists.sort(stable=True)
    lengths = torch.bincount(lists, minlength=kv_heads * blocks + 1)[:-1]
    tiles = (lengths + tile - 1) // tile
    chosen, size = torch.stack((lengths.sum(), tiles.sum() * tile)).tolist()
    if chosen == 0:
        return None
    lists, order = lists[:chosen].long(), order[:chosen]
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(chosen, device=device) + ((tiles.cumsum(0) - tiles) * tile - starts)[lists]
    first = order[starts.clamp(max=chosen - 1)] // slots
    rows = first.repeat_interleave(tiles * tile, output_size=size)
    rows[place] = order // slots
    padding = torch.ones(size, dtype=torch.bool, device=device)
    padding[place] = False
    places = torch.full((tokens * heads * slots,), size, device=device)
    places[order] = place
    return Routes(
        rows=rows,
        padding=padding,
        lengths=lengths.view(kv_heads, blocks),
        tiles=tiles.view(kv_heads, blocks),
        places=places.view(tokens * heads, slots),
    )
