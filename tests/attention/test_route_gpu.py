"""Lists on a Hopper GPU: its own kernels make those that Triton's do."""

from __future__ import annotations

import pytest
import torch

from moba_train.attention.blocks import cut

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]


def random_choices(lengths, block_size: int, shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """(K, T, G, R): distinct blocks of a query's segment, in any order, and some that are none."""
    kv_heads, group, choose = shape
    none = torch.iinfo(dtype).max
    made = []
    for length in lengths:
        blocks = max(choose, -(-length // block_size))
        scores = torch.rand(kv_heads, length, group, blocks, device="cuda")
        named = scores.topk(choose).indices
        made.append(torch.where((named * block_size >= length) | (torch.rand_like(scores[..., :1]) < 0.1), none, named))
    return torch.cat(made, 1).to(dtype)


@pytest.mark.parametrize(
    ("lengths", "block_size", "shape", "dtype"),
    [
        ((1, 0, 2), 16, (2, 2, 2), torch.uint8),
        ((3000, 77, 1200), 32, (3, 2, 7), torch.uint8),
        ((5000,), 64, (2, 4, 1), torch.uint8),
        ((4000,), 16, (1, 3, 11), torch.int16),
        ((40_000,), 16, (2, 1, 7), torch.int16),  # more blocks than the least room
        ((20_001, 9000), 64, (1, 1, 40), torch.int32),
        ((3000,), 4, (1, 1, 600), torch.int16),  # a row is more than a tile
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_the_lists_are_those_of_triton_s_kernels(lengths, block_size, shape, dtype, monkeypatch):
    from moba_train.attention.kernels import hopper, route

    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    blocks = cut(bounds.cuda(), block_size, sum(lengths))
    choices = random_choices(lengths, block_size, shape, dtype)
    assert route._tuned(choices, len(blocks.first), 100) is hopper.route
    found = route.route(choices, blocks)
    monkeypatch.setattr(route, "on_hopper", lambda *_: None)
    expected = route.route(choices, blocks)
    assert torch.equal(found.offsets, expected.offsets)
    for offsets in expected.offsets:
        start, stop = int(offsets[0, 0]), int(offsets[-1, -1])
        assert torch.equal(found.entries[start:stop], expected.entries[start:stop])


@pytest.mark.parametrize(
    ("blocks", "entries", "served"), [(4096, 22_272, True), (1 << 14, 9, False), (9, 60_000, False)]
)
def test_what_has_no_room_is_left_to_triton_s(blocks, entries, served):
    from moba_train.attention.kernels import route

    choices = torch.empty(4, dtype=torch.int16, device="cuda")
    assert (route._tuned(choices, blocks, entries) is not None) == served
