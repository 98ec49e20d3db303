"""A loader's batch as the model and the position bins take it, on the device."""

from __future__ import annotations

from typing import Any

import torch

from moba_train.data.loader import Batch
from moba_train.loss import IGNORE, shift_labels
from moba_train.metrics import PositionLoss


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    """Keywords of ``TokenLosses``; targets are shifted here, on the host, before any sharding of the sequence."""
    tensors = {
        "input_ids": batch.input_ids,
        "targets": shift_labels(batch.labels),
        "position_ids": batch.position_ids,
        "cu_seq_lens_q": batch.cu_seqlens,
    }
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    return {**moved, "max_length_q": batch.max_seqlen}


def valid_tokens(batch: Batch) -> int:
    """Tokens that are some position's target."""
    return int((batch.labels[:, 1:] != IGNORE).sum())


def count_positions(bins: PositionLoss, losses: torch.Tensor, inputs: dict[str, Any]) -> None:
    """Add (batch, length) token losses to the bins of their targets' positions."""
    positions = inputs["position_ids"]
    length = positions.shape[1]
    # A row is one whole segment where its last position is its last index.
    fills = (positions[:, -1:] == length - 1).expand_as(positions)
    valid = inputs["targets"] != IGNORE
    bins.add(losses.flatten(), positions.flatten() + 1, valid.flatten(), fills.flatten())
