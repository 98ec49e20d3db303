"""The convolution on keys, by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv1d, silu

from moba_train.attention.key_conv import KeyConvolution, places


def convolution(channels: int, width: int) -> KeyConvolution:
    made = KeyConvolution(channels, width)
    torch.nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(0))
    return made


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def by_conv1d(key: torch.Tensor, weight: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Every segment on its own, by torch's convolution, which multiplies in reading order."""
    channels, width = weight.shape
    outputs = []
    for part in key.split(lengths):
        padded = torch.cat((part.new_zeros(width - 1, channels), part)).T[None]
        mixed = conv1d(padded, weight.flip(1)[:, None], groups=channels)
        outputs.append(part + silu(mixed[0].T))
    return torch.cat(outputs)


@pytest.mark.parametrize("width", [3, 5])
@pytest.mark.parametrize("lengths", [[9], [1, 1, 2, 7], [0, 4, 0, 0, 6], [3]], ids=str)
def test_output_and_gradients_equal_the_plain_formula(lengths: list[int], width: int) -> None:
    made = convolution(6, width).double()
    key = torch.randn(sum(lengths), 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(key)
    wanted = by_conv1d(key, made.weight, [n for n in lengths if n])
    expected = torch.autograd.grad(wanted, (key, made.weight), grad)
    out = made(key, bounds(lengths))
    found = torch.autograd.grad(out, (key, made.weight), grad)
    for got, want in zip((out, *found), (wanted, *expected), strict=True):
        torch.testing.assert_close(got, want)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([3, 5]), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_a_packed_row_equals_its_segments_alone(lengths: list[int], width: int, empty: int) -> None:
    made = convolution(4, width)
    key = torch.randn(sum(lengths), 4)
    ends = bounds([*lengths, *[0] * empty])  # a fixed capacity: the end is repeated
    alone = torch.cat([made(part, bounds([len(part)])) for part in key.split(lengths)])
    torch.testing.assert_close(made(key, ends), alone)  # vector lanes round SiLU in their own way, by a last bit
    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    others = segment != segment[-1]
    poisoned = made(key.masked_fill(others[:, None], torch.nan), ends)
    assert torch.equal(poisoned[~others], made(key, ends)[~others])


def test_causal_and_no_wider_than_it_says() -> None:
    made = convolution(4, 3)
    key = torch.randn(10, 4)
    changed = key.clone()
    changed[5] += 1
    rows = (made(changed, bounds([10])) != made(key, bounds([10]))).any(1)
    assert rows.nonzero().flatten().tolist() == [5, 6, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_first_nothing_changes_and_gradients_flow(dtype: torch.dtype) -> None:
    made = KeyConvolution(4, 5, dtype)
    key = torch.randn(2, 8, 4, dtype=dtype, requires_grad=True)
    out = made(key, bounds([8, 8]))
    assert torch.equal(out, key) and out.dtype == dtype
    out.square().sum().backward()
    assert torch.equal(key.grad, 2 * key)  # SiLU is 0 there, but the weights' own gradient is not
    assert (made.weight.grad != 0).all()


def test_places() -> None:
    assert places(bounds([3, 0, 1, 4, 0]), 8).tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
