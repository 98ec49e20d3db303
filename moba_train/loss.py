"""Next-token loss of every position, without the full logits.

Logits of a 128K-token row over a 128K vocabulary are 64 GB in fp32. Here they exist for one tile of tokens at a time.
In training a tile's loss and gradients are computed at once, in the forward pass: three products with the output
layer's matrix. Where that matrix is not all the layer does, the tile is computed again in the backward pass
(``torch.utils.checkpoint``), which costs a fourth and works with whatever the layer is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from moba_train.layers.add_product import add_product
from moba_train.layers.cross_entropy import IGNORE, losses_and_gradient

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """Targets of each position from transformers' unshifted labels: position i predicts label i + 1 of its row.

    Args:
        labels: (batch, length) int64, -100 where a token is nobody's target (a segment's first token, padding).

    Returns:
        (batch, length) int64; the last column is -100.
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def tiled_losses(
    hidden: torch.Tensor, output_layer: Callable[[torch.Tensor], torch.Tensor], targets: torch.Tensor, tile_tokens: int
) -> torch.Tensor:
    """Cross entropy of each token, in fp32.

    Args:
        hidden: (tokens, hidden_size), the backbone's last hidden states.
        output_layer: hidden states → logits.
        targets: (tokens,) int64, -100 where there is none.
        tile_tokens: tokens whose logits exist at one time.

    Returns:
        (tokens,) fp32 nats, 0 where the target is -100.
    """

    def tile(hidden_tile: torch.Tensor, targets_tile: torch.Tensor) -> torch.Tensor:
        logits = output_layer(hidden_tile).float()
        return F.cross_entropy(logits, targets_tile, ignore_index=IGNORE, reduction="none")

    tiles = zip(hidden.split(tile_tokens), targets.split(tile_tokens), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([tile(h, t) for h, t in tiles])
    return torch.cat([checkpoint(tile, h, t, use_reentrant=False) for h, t in tiles])


class _ScaledLoss(torch.autograd.Function):
    """Losses and, times ``scale``, their sum; the sum's gradients are computed here and kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        scale: float,
        tile_tokens: int,
        fused: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        grad_hidden = hidden.new_empty(hidden.shape)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        tiles = (x.split(tile_tokens) for x in (hidden, targets, losses, grad_hidden))
        for tile, targets_tile, losses_tile, grad_tile in zip(*tiles, strict=True):
            losses_, gradient = losses_and_gradient(tile @ weight.t(), targets_tile, fused)
            losses_tile.copy_(losses_)
            # The scale goes into the product's own fp32, so that bf16 rounds once.
            torch.addmm(grad_tile, gradient, weight, beta=0, alpha=scale, out=grad_tile)
            add_product(grad_weight, gradient.t(), tile)
            del gradient  # before the next tile's logits are made
        ctx.gradients = (grad_hidden, grad_weight.mul_(scale).to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return losses.sum() * scale, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _grad_losses: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = (gradient.mul_(grad) for gradient in ctx.gradients)
        del ctx.gradients
        return grad_hidden, grad_weight, None, None, None, None


def scaled_loss(
    hidden: torch.Tensor,
    output_layer: nn.Module,
    targets: torch.Tensor,
    scale: float,
    tile_tokens: int,
    fused: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a training step differentiates, and the losses it is made of.

    Args:
        hidden, output_layer, targets, tile_tokens: as in ``tiled_losses``.
        scale: what the sum of losses is multiplied with; known before, it need not pass through the tiles again.
        fused: the cross entropy in one Triton kernel, on CUDA.

    Returns:
        scale * the sum of losses, a scalar with gradients, and the losses (tokens,) in fp32 nats, without.
    """
    if type(output_layer) is nn.Linear and output_layer.bias is None and torch.is_grad_enabled():
        return _ScaledLoss.apply(hidden, output_layer.weight, targets, scale, tile_tokens, fused)
    losses = tiled_losses(hidden, partial(type(output_layer).forward, output_layer), targets, tile_tokens)
    return losses.sum() * scale, losses.detach()


def take_targets(output_layer: nn.Module, tile_tokens: int, fused: bool) -> None:
    """Let the output layer be called with targets and a scale too, for ``scaled_loss`` in the place of logits.

    A part of the layer's forward pass, the loss finds its matrix whole under ZeRO-3, which gathers it for that time,
    and once for all tiles.
    """

    def forward(hidden: torch.Tensor, targets: torch.Tensor | None = None, scale: float = 1.0) -> Any:
        if targets is None:
            return type(output_layer).forward(output_layer, hidden)
        return scaled_loss(hidden, output_layer, targets, scale, tile_tokens, fused)

    output_layer.forward = forward


def refuse_changed_logits(configuration: PretrainedConfig) -> None:
    """
    Raises:
        ValueError: the model changes its logits after the output layer, which the tiles would skip.
    """
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier"):
        value = getattr(configuration, name, None)
        if value not in (None, 1):
            raise ValueError(
                f"{name}={value}: {configuration.model_type} changes its logits after the output layer, which the "
                f"tiled loss does not; use a Llama, Mistral or Qwen model"
            )


class TokenLosses(nn.Module):
    """A causal LM whose forward pass gives losses in the place of logits."""

    def __init__(self, model: PreTrainedModel, tile_tokens: int, fused: bool = False) -> None:
        """
        Raises:
            ValueError: as ``refuse_changed_logits``.
        """
        super().__init__()
        refuse_changed_logits(model.config)
        self.model = model
        take_targets(model.get_output_embeddings(), tile_tokens, fused)

    def forward(
        self, input_ids: torch.Tensor, targets: torch.Tensor, scale: float = 1.0, **model_keywords: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            input_ids, targets: (batch, length) int64; ``targets`` as ``shift_labels`` gives them.
            scale: what the sum of losses is multiplied with.
            model_keywords: position_ids and the segment bounds, for the backbone.

        Returns:
            scale * the sum of losses, for the backward pass, and the losses: (batch, length) fp32 nats without
            gradients; entry i is the loss of the token at i + 1, 0 where that is no target.
        """
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False, **model_keywords).last_hidden_state
        output_layer = self.model.get_output_embeddings()
        loss, losses = output_layer(hidden.flatten(0, 1), targets.flatten(), scale)
        return loss, losses.view_as(targets)
