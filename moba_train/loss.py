"""Next-token loss of every position, without the full logits.

Logits of a 128K-token row over a 128K vocabulary are 64 GB in fp32. Here they exist for one tile of tokens at a time,
forward and backward: each tile is recomputed in the backward pass (``torch.utils.checkpoint``), which costs one more
pass through the output layer and works with whatever the output layer is, ZeRO-3 partitions and biases included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

IGNORE = -100  # transformers' label of a position without a target


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """Targets of each position from transformers' unshifted labels: position i predicts label i + 1 of its row.

    Args:
        labels: (batch, length) int64, -100 where a token is nobody's target (a segment's first token, padding).

    Returns:
        (batch, length) int64; the last column is -100.
    """
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def tiled_losses(
    hidden: torch.Tensor, output_layer: nn.Module, targets: torch.Tensor, tile_tokens: int
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
    """A causal LM whose forward pass gives the loss of every token in the place of logits."""

    def __init__(self, model: PreTrainedModel, tile_tokens: int) -> None:
        """
        Raises:
            ValueError: as ``refuse_changed_logits``.
        """
        super().__init__()
        refuse_changed_logits(model.config)
        self.model = model
        self.tile_tokens = tile_tokens

    def forward(self, input_ids: torch.Tensor, targets: torch.Tensor, **model_keywords: Any) -> torch.Tensor:
        """
        Args:
            input_ids, targets: (batch, length) int64; ``targets`` as ``shift_labels`` gives them.
            model_keywords: position_ids and the segment bounds, for the backbone.

        Returns:
            (batch, length) fp32 nats; entry i is the loss of the token at i + 1, 0 where that is no target.
        """
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False, **model_keywords).last_hidden_state
        output_layer = self.model.get_output_embeddings()
        losses = tiled_losses(hidden.flatten(0, 1), output_layer, targets.flatten(), self.tile_tokens)
        return losses.view_as(targets)
