"""Loss by position on the fixed held-out rows, under whatever attention plan and RoPE the model has now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from moba_train.batch import count_positions, model_inputs
from moba_train.data.loader import Batch
from moba_train.metrics import PositionLoss
from moba_train.runtime import Runtime


def position_loss(
    module: nn.Module, batches: Sequence[Batch], context_length: int, bin_size: int, runtime: Runtime
) -> Iterator[tuple[str, float]]:
    """Read ``batches`` (this rank's share) and yield the losses of all ranks together.

    Yields:
        ``eval/loss``, ``eval/trailing_loss`` and ``eval/position_loss/<bin start>``, nats a token.
    """
    bins = PositionLoss(context_length, bin_size, runtime.device)
    was_training = module.training
    module.eval()
    with torch.no_grad():
        for batch in batches:
            inputs = model_inputs(batch, runtime)
            _, losses = module(**inputs)
            count_positions(bins, losses, inputs, batch)
    module.train(was_training)
    bins.all_reduce()
    yield from bins.as_row("eval", curve=True).items()
