"""AdamW with its moments in host memory: torch's own numbers, kept on the host by checkpoints too."""

from __future__ import annotations

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moba_train import host_moments
from moba_train.host_moments import MOMENTS, HostMomentAdamW

SETTINGS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6}
PIECE = 32  # of 7 x 13 numbers: three pieces, the last one shorter


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 7), nn.Tanh(), nn.Linear(7, 3, bias=False))


def groups(module: nn.Module) -> list[dict]:
    matrices = [parameter for parameter in module.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in module.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int) -> None:
    for step in range(first, first + count):
        inputs = torch.randn(5, 13, generator=torch.Generator().manual_seed(step))
        module(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("piece", [16, PIECE, 1 << 20])
def test_the_numbers_are_those_of_torch(piece: int) -> None:
    ours, theirs = model(), model()
    optimizer = HostMomentAdamW(groups(ours), piece, **SETTINGS)
    expected = torch.optim.AdamW(groups(theirs), fused=True, **SETTINGS)
    steps(ours, optimizer, 0, 4)
    steps(theirs, expected, 0, 4)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    for got, want in zip(optimizer.state.values(), expected.state.values(), strict=True):
        assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


def test_a_saved_state_goes_on_bit_by_bit_and_is_moved_once() -> None:
    whole = model()
    optimizer = HostMomentAdamW(groups(whole), PIECE, **SETTINGS)
    steps(whole, optimizer, 0, 2)
    resumed = copy.deepcopy(whole)
    saved = copy.deepcopy(optimizer.state_dict())
    steps(whole, optimizer, 2, 2)
    again = HostMomentAdamW(groups(resumed), PIECE, **SETTINGS)
    again.load_state_dict(saved)
    assert not any(name in state for state in saved["state"].values() for name in MOMENTS)
    steps(resumed, again, 2, 2)
    assert all(map(torch.equal, resumed.parameters(), whole.parameters()))


def test_a_fresh_state_loads() -> None:
    optimizer = HostMomentAdamW(groups(model()), **SETTINGS)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state


class Cudart:
    """Of CUDA's calls, those for pinned memory; registering more than ``most`` bytes at a time fails."""

    def __init__(self, most: int) -> None:
        self.most, self.registered = most, {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if size > self.most:
            return 2
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


def test_pinned_memory_is_as_large_as_its_tensor_and_given_back_with_it(monkeypatch) -> None:
    cuda = Cudart(most=4000)
    monkeypatch.setattr(host_moments.torch, "cuda", SimpleNamespace(cudart=lambda: cuda))
    moment = host_moments.zeros(torch.Size((9, 100)), pinned=True)
    assert moment.shape == (9, 100) and not moment.any()
    assert cuda.registered == {moment.data_ptr(): 3600}
    part = moment[3:4].fill_(2)
    del moment
    gc.collect()
    assert len(cuda.registered) == 1 and (part == 2).all(), "a part keeps it"
    del part
    gc.collect()
    assert not cuda.registered
    with pytest.raises(ValueError, match=r"train\.offload\.moments=true: 0\.0 GB more .* \(CUDA error 2\)"):
        host_moments.zeros(torch.Size((1001,)), pinned=True)
    gc.collect()
    assert not cuda.registered
