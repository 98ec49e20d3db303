"""A batch on its way to the model: what the segment bounds tell of its rows."""

from __future__ import annotations

import pytest
import torch

from moba_train.batch import count_positions, model_inputs, valid_tokens
from moba_train.data.loader import Batch
from moba_train.loss import IGNORE
from moba_train.metrics import PositionLoss
from moba_train.runtime import Runtime


@pytest.mark.parametrize(
    ("bounds", "kept"),
    [
        ([0, 4, 8, 12, 12, 12], [0, 4, 8, 12]),
        ([0, 4, 7, 8, 12, 12], [0, 4, 7, 8, 12, 12]),
        ([0, 4, 8, 11, 12, 12], [0, 4, 8, 11, 12, 12]),
    ],
    ids=["whole rows", "a packed row", "a padded row"],
)
def test_bounds_of_whole_rows_are_as_many_as_rows(bounds: list[int], kept: list[int]) -> None:
    ids = torch.arange(12).view(3, 4)
    batch = Batch(ids, ids, torch.arange(4).expand(3, 4), torch.tensor(bounds, dtype=torch.int32), 4)
    inputs = model_inputs(batch, Runtime(0, 1, 0, torch.device("cpu")))
    assert inputs["cu_seq_lens_q"].tolist() == kept and inputs["max_length_q"] == 4


@pytest.mark.parametrize("slices", [1, 2])
def test_losses_are_counted_at_their_targets(slices: int) -> None:
    """One row is a whole segment; the other a segment of 3 tokens and padding, whose last position could be mistaken
    for the end of a context."""
    ids = torch.arange(8).view(2, 4)
    labels = torch.tensor([[IGNORE, 1, 2, 3], [IGNORE, 5, 6, IGNORE]])
    positions = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0]])
    batch = Batch(ids, labels, positions, torch.tensor([0, 4, 7, 8], dtype=torch.int32), 4)
    assert valid_tokens(batch) == 5
    losses = torch.tensor([[1.0, 2.0, 4.0, 99.0], [8.0, 16.0, 99.0, 99.0]])
    bins = PositionLoss(context_length=4, bin_size=2)
    for rank, of_slice in enumerate(losses.chunk(slices, dim=1)):
        runtime = Runtime(rank, slices, rank, torch.device("cpu"), sequence_parallel_size=slices)
        count_positions(bins, of_slice.contiguous(), model_inputs(batch, runtime), batch)
    assert bins.as_row("x", curve=True) == {
        "x/loss": 31 / 5,
        "x/trailing_loss": (2 + 4) / 2,
        "x/position_loss/000000": (1 + 8) / 2,
        "x/position_loss/000002": (2 + 4 + 16) / 3,
    }
