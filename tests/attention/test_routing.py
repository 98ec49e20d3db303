from __future__ import annotations

import pytest
import torch

from attention.cases import DEVICES
from moba_train.attention.routing import route


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", [1, 4, 32])
def test_lists_hold_every_choice_once_in_order(device, tile):
    tokens, heads, kv_heads, slots, blocks = 50, 6, 2, 3, 7
    generator = torch.Generator().manual_seed(0)
    choices = torch.rand(tokens, heads, blocks, generator=generator).argsort(-1)[..., :slots].to(torch.int16)
    choices[torch.rand(choices.shape, generator=generator) < 0.3] = -1
    choices[choices == 5] = -1  # a block that nobody chose
    routes = route(choices.to(device), kv_heads, blocks, tile)
    assert routes is not None
    rows, padding = routes.rows.cpu(), routes.padding.cpu()
    end = 0
    for kv_head in range(kv_heads):
        for block in range(blocks):
            length, tiles = int(routes.lengths[kv_head, block]), int(routes.tiles[kv_head, block])
            assert tiles == -(-length // tile)
            start, end = end, end + tiles * tile
            expected = [
                t * heads + h
                for t in range(tokens)
                for h in range(kv_head * 3, kv_head * 3 + 3)
                if block in choices[t, h].tolist()
            ]
            assert rows[start : start + length].tolist() == expected
            assert padding[start:end].tolist() == [False] * length + [True] * (end - start - length)
            assert set(rows[start + length : end].tolist()) <= set(expected[:1])
    assert end == len(rows)
    for row, places in enumerate(routes.places.tolist()):
        for slot, place in enumerate(places):
            if choices[row // heads, row % heads, slot] < 0:
                assert place == end
            else:
                assert rows[place] == row and not padding[place]


def test_nothing_chosen_is_no_route():
    assert route(torch.full((5, 2, 3), -1, dtype=torch.int16), 1, 4, 8) is None
    assert route(torch.empty(5, 2, 0, dtype=torch.int16), 1, 4, 8) is None
