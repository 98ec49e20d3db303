"""A tiled MLP gives the numbers of the whole one, holds a tile's activations only and is not computed a third time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from moba_train.layers import tiled_mlp
from moba_train.layers.tiled_mlp import gated_mlps, tile_mlps
from tiny import TINY_LLAMA


def llama_mlp(bias: bool) -> LlamaMLP:
    keywords = {key: value for key, value in TINY_LLAMA.items() if key != "model_type"}
    module = LlamaMLP(AutoConfig.for_model("llama", **{**keywords, "mlp_bias": bias}))
    return module.apply(lambda part: nn.init.normal_(part.bias) if getattr(part, "bias", None) is not None else None)


def run(module: nn.Module, hidden: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    out = module(hidden)
    return [out, *torch.autograd.grad((out * weights).sum(), [hidden, *module.parameters()])]


@pytest.mark.parametrize("tile", [1, 7, 100])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_tiles_equal_the_whole(tile: int, bias: bool) -> None:
    module = llama_mlp(bias)
    tiled = copy.deepcopy(module)
    tile_mlps(tiled, tile)
    hidden = torch.randn(2, 20, module.hidden_size, requires_grad=True)
    weights = torch.randn_like(hidden)
    for got, want in zip(run(tiled, hidden, weights), run(module, hidden, weights), strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(tiled(hidden), module(hidden))


@pytest.mark.parametrize("frozen", [(), ("gate_proj", "up_proj", "down_proj")], ids=["trained", "frozen"])
def test_an_input_that_needs_no_gradient(frozen: tuple[str, ...]) -> None:
    """As behind a frozen layer."""
    module = llama_mlp(bias=False)
    for name in frozen:
        getattr(module, name).requires_grad_(False)
    tiled = copy.deepcopy(module)
    tile_mlps(tiled, 8)
    hidden = torch.randn(1, 20, module.hidden_size)
    assert tiled(hidden).requires_grad == module(hidden).requires_grad == (not frozen)
    if not frozen:
        grads = [torch.autograd.grad(one(hidden).square().sum(), list(one.parameters())) for one in (tiled, module)]
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want)
    assert hidden.grad is None


def test_weight_gradients_of_tiles_add_up_in_fp32() -> None:
    """4,096 tiles of one token: bf16 sums would stop growing at 256 equal steps."""
    module = llama_mlp(bias=False).to(torch.bfloat16)
    tiled = copy.deepcopy(module)
    tile_mlps(tiled, 1)
    hidden = torch.randn(1, 1, module.hidden_size, dtype=torch.bfloat16).expand(1, 4096, -1).clone().requires_grad_()
    weights = torch.ones_like(hidden)
    for got, want in zip(run(tiled, hidden, weights)[2:], run(module, hidden, weights)[2:], strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())


def test_a_checkpointed_layer_computes_it_twice(monkeypatch) -> None:
    """Once forward, once in tiles in the backward pass; the recomputation of the layer leaves it out."""
    calls: list[int] = []
    module = llama_mlp(bias=False)
    activation = module.act_fn
    module.act_fn = nn.Identity()
    module.act_fn.forward = lambda x: calls.append(len(x)) or activation(x)
    tile_mlps(module, 8)
    norm = nn.LayerNorm(module.hidden_size)
    hidden = torch.randn(1, 24, module.hidden_size, requires_grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return x + module(norm(x))

    expected = torch.autograd.grad(layer(hidden).square().sum(), [hidden, *module.parameters()])
    calls.clear()
    found = torch.autograd.grad(
        checkpoint(layer, hidden, use_reentrant=False).square().sum(), [hidden, *module.parameters()]
    )
    assert calls == [8] * 6
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_a_model_without_gated_mlps_is_refused() -> None:
    plain = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    assert gated_mlps(plain) == []
    with pytest.raises(ValueError, match=r"train\.mlp_tile_tokens=64: Sequential has no gated MLP"):
        tiled_mlp.tile_mlps(plain, 64)
