from __future__ import annotations

import pytest
import torch

from attention.cases import DEVICES
from moba_train.attention.blocks import cut, most_blocks


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(
    ("lengths", "bounds", "first"),
    [
        ([10], [0, 4, 8, 10], [0, 0, 0]),
        ([8], [0, 4, 8], [0, 0]),
        ([1, 1], [0, 1, 2], [0, 1]),
        ([5, 0, 3, 0, 9, 0, 0], [0, 4, 5, 8, 12, 16, 17], [0, 0, 2, 3, 3, 3]),
    ],
    ids=["tail", "whole", "one_token", "empty_segments"],
)
def test_bounds(device, compiling, lengths, bounds, first, monkeypatch):
    """On a GPU, and while torch.compile traces, the number of blocks is not known, but the most there can be."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    tokens = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    blocks = cut(cu_seqlens, 4, tokens)
    known = device == "cpu" and not compiling
    assert len(blocks.first) == (len(first) if known else most_blocks(cu_seqlens, 4, tokens))
    assert blocks.bounds.dtype == blocks.first.dtype == blocks.of_token.dtype == torch.int32
    assert blocks.bounds[: len(bounds)].tolist() == bounds
    assert (blocks.bounds[len(bounds) :] == tokens).all()
    assert blocks.first[: len(first)].tolist() == first
    expected = [n for n in range(len(first)) for _ in range(bounds[n], bounds[n + 1])]
    assert blocks.of_token.tolist() == expected


@pytest.mark.parametrize(("lengths", "most"), [([10], 3), ([8], 3), ([1, 1, 1], 3), ([5, 9, 1], 6), ([0, 4], 3)])
def test_the_most_blocks_that_so_many_segments_can_have(lengths, most):
    """A whole block for every so many tokens, and a short one for each segment."""
    assert most_blocks(torch.tensor([0, *lengths]).cumsum(0).int(), 4, sum(lengths)) == most


def test_bounds_made_in_inference_mode_are_cut_too():
    """Such tensors have no version, by which others are known to be as they were."""
    with torch.inference_mode():
        assert cut(torch.tensor([0, 10], dtype=torch.int32), 4, 10).bounds.tolist() == [0, 4, 8, 10]


def test_every_token_has_its_block_at_random():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = torch.randint(0, 40, (7,), generator=generator)
        lengths[3] += 1
        block_size = int(torch.randint(1, 20, (), generator=generator))
        cu_seqlens = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
        blocks = cut(cu_seqlens, block_size, int(lengths.sum()))
        for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            for token in range(start, stop):
                own = blocks.of_token[token]
                assert own - blocks.first[own] == (token - start) // block_size
                assert blocks.bounds[own] == token - (token - start) % block_size
