"""A loader's batch as the model and the position bins take it, on the device."""

from __future__ import annotations

from typing import Any

import torch

from moba_train.data.loader import Batch
from moba_train.loss import IGNORE, shift_labels
from moba_train.metrics import PositionLoss
from moba_train.runtime import Runtime


def model_inputs(batch: Batch, runtime: Runtime) -> dict[str, Any]:
    """Keywords of ``TokenLosses``: of each row, this rank's slice. Targets are shifted here, before rows are cut.

    The segment bounds stay those of whole rows, since attention is given whole rows (``parallel.sequence``).
    """
    rows = {
        "input_ids": batch.input_ids,
        "targets": shift_labels(batch.labels),
        "position_ids": batch.position_ids,
    }
    size, rank = runtime.sequence_parallel_size, runtime.sequence_parallel_rank
    slices = {name: tensor.chunk(size, dim=1)[rank].contiguous() for name, tensor in rows.items()}
    bounds, (count, length) = batch.cu_seqlens, batch.input_ids.shape
    if (bounds[: count + 1].diff() == length).all():
        # Each row is one segment: attention sees it by the number of bounds and max_seqlen, without reading them.
        bounds = bounds[: count + 1]
    tensors = {**slices, "cu_seq_lens_q": bounds}
    moved = {name: tensor.to(runtime.device, non_blocking=True) for name, tensor in tensors.items()}
    return {**moved, "max_length_q": batch.max_seqlen}


def valid_tokens(batch: Batch) -> int:
    """Tokens that are some position's target."""
    return int((batch.labels[:, 1:] != IGNORE).sum())


def count_positions(bins: PositionLoss, losses: torch.Tensor, inputs: dict[str, Any], batch: Batch) -> None:
    """Add token losses, (batch, length of the slice), to the bins of their targets' positions."""
    positions = inputs["position_ids"]
    # A row is one whole segment where its last position is its last index: of the whole row, so not of its slices.
    fills = batch.position_ids[:, -1:] == batch.position_ids.shape[1] - 1
    fills = fills.to(positions.device, non_blocking=True).expand_as(positions)
    valid = inputs["targets"] != IGNORE
    bins.add(losses.flatten(), positions.flatten() + 1, valid.flatten(), fills.flatten())
