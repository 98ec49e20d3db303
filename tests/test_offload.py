from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moba_train.offload import HiddenStateOffload, HostMemory

CPU = torch.device("cpu")


def layers() -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)) for _ in range(4))


def gradients(model: nn.ModuleList, hidden: torch.Tensor, offload: HiddenStateOffload | None) -> tuple:
    for layer in model:
        if offload is None:
            hidden = checkpoint(layer, hidden, use_reentrant=False)
        else:
            with offload:
                hidden = checkpoint(layer, hidden, use_reentrant=False)
    return torch.autograd.grad(hidden.square().sum(), list(model.parameters()))


@pytest.mark.parametrize("chunk", [64, 100, 1 << 20])
def test_offload_changes_no_number_and_takes_the_inputs_alone(chunk: int) -> None:
    model, hidden = layers(), torch.randn(9, 16, requires_grad=True)
    expected = gradients(model, hidden, None)
    memory = HostMemory(CPU, chunk)
    offload = HiddenStateOffload(CPU, memory, smallest=0)
    for _ in range(2):
        found = gradients(model, hidden, offload)
        gc.collect()
        # Four inputs of 9 x 16 x 4 bytes, no activation; given back with the graph and used again by the next.
        assert len(memory._free) == 4 * -(-hidden.nbytes // chunk)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


def test_small_tensors_and_integers_stay() -> None:
    memory = HostMemory(CPU, 64)
    offload = HiddenStateOffload(CPU, memory, smallest=1000)
    index, weights = torch.randint(4, (500,)), torch.randn(4, 2, requires_grad=True)
    with offload:
        out = weights[index].exp().sum()
    out.backward()
    del out
    gc.collect()
    assert len(memory._free) == -(-500 * 2 * 4 // 64)  # the exponentials alone


@pytest.mark.gpu
def test_tensors_leave_the_gpu_and_come_back() -> None:
    device = torch.device("cuda")
    model, hidden = layers().to(device), torch.randn(1 << 16, 16, device=device, requires_grad=True)
    expected = gradients(model, hidden, None)
    offload = HiddenStateOffload(device)
    for _ in range(3):
        found = gradients(model, hidden, offload)
    assert all(chunk.is_pinned() for chunk in offload.memory._free)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)
