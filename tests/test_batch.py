"""A batch on its way to the model: what the segment bounds tell of its rows."""

from __future__ import annotations

import pytest
import torch

from moba_train.batch import model_inputs
from moba_train.data.loader import Batch
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
