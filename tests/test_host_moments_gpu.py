"""AdamW with its moments in host memory, on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch

from moba_train.host_moments import MOMENTS, PIECE, HostMomentAdamW

pytestmark = pytest.mark.gpu

SIZES = (3 * PIECE + 5, PIECE, 1000)  # more pieces than rooms, one piece, a part of one
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters(like: list[torch.nn.Parameter] | None = None) -> list[torch.nn.Parameter]:
    values = (
        [torch.randn(size, device="cuda") for size in SIZES] if like is None else [p.detach().clone() for p in like]
    )
    return [torch.nn.Parameter(value) for value in values]


def step(*optimizers: torch.optim.Optimizer) -> None:
    """Each with the same gradients."""
    for several in zip(*(optimizer.param_groups[0]["params"] for optimizer in optimizers), strict=True):
        gradient = torch.randn_like(several[0])
        for parameter in several:
            parameter.grad = gradient.clone()
    for optimizer in optimizers:
        optimizer.step()


def test_the_numbers_are_those_of_torch_and_go_on_so() -> None:
    torch.manual_seed(0)
    ours = parameters()
    theirs = parameters(ours)
    optimizer, expected = HostMomentAdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, fused=True, **SETTINGS)
    for _ in range(3):
        step(optimizer, expected)
    assert all(map(torch.equal, ours, theirs))
    for mine, other in zip(ours, theirs, strict=True):
        for name in MOMENTS:
            assert optimizer.state[mine][name].is_pinned()
            assert torch.equal(optimizer.state[mine][name], expected.state[other][name].cpu())
    resumed = parameters(ours)
    again = HostMomentAdamW(resumed, **SETTINGS)
    before = torch.cuda.memory_allocated()
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.cuda.memory_allocated() < before + 4096  # counts of steps alone
    step(optimizer, expected, again)
    assert all(map(torch.equal, ours, resumed))
