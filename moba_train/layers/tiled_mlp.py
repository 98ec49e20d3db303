"""The MLP of a decoder layer, a tile of tokens at a time: its activations never exist for a whole row.

A layer's gated MLP holds some ten times its input in activations, 69 GB for a million tokens of a 1B model. The forward
pass here keeps the input alone; the backward pass computes a tile's activations again and adds up weight gradients in
fp32. DeepSpeed's TiledMLP would compute the forward pass a third time inside a checkpointed layer, and adds up weight
gradients in the model's type.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moba_train.layers.add_product import add_product

_MAPS = ("gate_proj", "up_proj", "down_proj")

Gated = Callable[[Tensor, Tensor], Tensor]


def gated_mlps(model: nn.Module) -> list[nn.Module]:
    """Modules of the form ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``."""
    return [
        module
        for module in model.modules()
        if {name for name, _ in module.named_children()} - {"act_fn"} == set(_MAPS)
        and all(type(getattr(module, name)) is nn.Linear for name in _MAPS)
        and callable(getattr(module, "act_fn", None))
    ]


def tile_mlps(model: nn.Module, tile_tokens: int) -> None:
    """From now on the gated MLPs of ``model`` work through tiles of ``tile_tokens`` tokens.

    Raises:
        ValueError: the model has none.
    """
    modules = gated_mlps(model)
    if not modules:
        raise ValueError(
            f"train.mlp_tile_tokens={tile_tokens}: {type(model).__name__} has no gated MLP (gate_proj, up_proj, "
            f"down_proj) to tile; set it to 0"
        )
    for module in modules:
        module.forward = partial(_forward, module, tile_tokens)
        module.tiled = True  # type: ignore[assignment]


def _forward(module: nn.Module, tile_tokens: int, hidden: Tensor) -> Tensor:
    layers = [getattr(module, name) for name in _MAPS]
    gated: Gated = getattr(module, "gated", None) or (lambda gate, up: module.act_fn(gate) * up)  # type: ignore[operator]
    weights = (*(layer.weight for layer in layers), *(layer.bias for layer in layers))
    if not hidden.requires_grad and any(weight is not None and weight.requires_grad for weight in weights):
        hidden = hidden.detach().requires_grad_()  # or nothing would keep it: what is before this layer is frozen
    kept = _KeepInput.apply(hidden)
    return _Tiles.apply(kept, kept.grad_fn, tile_tokens, gated, *weights)


class _KeepInput(torch.autograd.Function):
    """Saves the input for ``_Tiles``, before that runs: a checkpoint stops recomputing once all that was saved is there
    again, so the recomputation of a layer that ends in its MLP leaves the MLP's forward pass out."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Tiles(torch.autograd.Function):
    """Saves nothing itself: weights are held as they are, their gradients computed where ZeRO-3 has gathered them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, keeper: Any, tile_tokens: int, gated: Gated, *weights: Any) -> Tensor:
        ctx.keeper, ctx.tile_tokens, ctx.gated, ctx.weights = keeper, tile_tokens, gated, weights
        gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias = weights
        out = hidden.new_empty(hidden.shape)
        for tile, out_tile in zip(*(x.flatten(0, -2).split(tile_tokens) for x in (hidden, out)), strict=True):
            gate, up = F.linear(tile, gate_weight, gate_bias), F.linear(tile, up_weight, up_bias)
            out_tile.copy_(F.linear(gated(gate, up), down_weight, down_bias))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.keeper.saved_tensors
        gate_weight, up_weight, down_weight, gate_bias, up_bias, _ = ctx.weights
        sums = [None if w is None else torch.zeros_like(w, dtype=_accumulator(w)) for w in ctx.weights]
        grad_hidden = hidden.new_empty(hidden.shape)
        tiles = (x.flatten(0, -2).split(ctx.tile_tokens) for x in (hidden, grad.contiguous(), grad_hidden))
        for tile, grad_tile, grad_hidden_tile in zip(*tiles, strict=True):
            gate = F.linear(tile, gate_weight, gate_bias).requires_grad_()
            up = F.linear(tile, up_weight, up_bias).requires_grad_()
            with torch.enable_grad():
                product = ctx.gated(gate, up)
            # The product is read before its gradient is formed: a fused kernel may write that over its inputs.
            _add_gradients(sums, 2, grad_tile, product.detach())
            grad_gate, grad_up = torch.autograd.grad(product, (gate, up), grad_tile @ down_weight)
            _add_gradients(sums, 0, grad_gate, tile)
            _add_gradients(sums, 1, grad_up, tile)
            torch.mm(grad_gate, gate_weight, out=grad_hidden_tile)
            grad_hidden_tile.addmm_(grad_up, up_weight)
            del gate, up, product, grad_gate, grad_up  # before the next tile's are made, and the sums in bf16
        found = [s if s is None else s.to(w.dtype) for s, w in zip(sums, ctx.weights, strict=True)]
        return grad_hidden, None, None, None, *found


def _add_gradients(sums: list[Tensor | None], index: int, grad: Tensor, inputs: Tensor) -> None:
    """Add a linear map's gradients of weight and bias."""
    weight, bias = sums[index], sums[index + len(_MAPS)]
    assert weight is not None
    add_product(weight, grad.t(), inputs)
    if bias is not None:
        bias += grad.sum(0)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
