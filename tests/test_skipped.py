"""A step whose loss or gradient is not finite on one rank is skipped by all, without a trace."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from moba_train import resolved
from moba_train.config import Config
from moba_train.data.tokens import prepare_store
from moba_train.metrics_file import read_rows
from moba_train.skipped import SkippedSteps
from skipped_facts import GRADIENT
from tiny import checkpoint_tensors, run_ranks


def test_so_many_in_a_row_end_the_run(caplog) -> None:
    caplog.set_level("INFO", "moba_train")
    skipped = SkippedSteps(limit=2, total=7)
    skipped.note(1, 3.0, math.nan)
    assert "step 1 was skipped: its loss is 3 and its gradient norm nan" in caplog.text
    skipped.note(2, 3.0, 1.0)
    skipped.note(3, math.inf, math.inf)
    assert skipped.total == 9
    skipped = SkippedSteps(2, skipped.total, skipped.in_a_row)  # as a run that is resumed here
    with pytest.raises(FloatingPointError, match=r"step 4 .* loss is nan .* 2 in a row \(train\.nonfinite_limit=2\)"):
        skipped.note(4, math.nan, math.nan)


@pytest.fixture(scope="module")
def runs(tiny_config_module: Config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("skipped")
    (folder / resolved.FILE).write_text(resolved.to_yaml(tiny_config_module))
    prepare_store(tiny_config_module.data, str(tiny_config_module.model.tokenizer), progress=False)
    script = Path(__file__).with_name("skipped_facts.py")
    run_ranks(script, [str(folder / resolved.FILE), str(folder)], 2)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("run", ["loss_0", "loss_2", *(f"gradient_{switches}" for switches in GRADIENT)])
def test_all_ranks_skip_what_is_not_finite_on_one(runs: Path, run: str) -> None:
    checkpoints = runs / run / "checkpoints"
    states = [checkpoint_tensors(checkpoints / f"step_{step:08d}") for step in range(2, 7)]
    same = [all(torch.equal(before[key], after[key]) for key in before) for before, after in pairwise(states)]
    assert same == [True, True, False, False], "steps 3 and 4 update nothing, moments included; 5 and 6 do"

    rows = [row for row in read_rows(runs / run / "metrics.jsonl") if "train/loss" in row]
    assert [row["train/skipped_steps"] for row in rows] == [0, 0, 1, 2, 2, 2]
    assert [row["train/gradient_norm"] is None for row in rows] == [False, False, True, True, False, False]
    expected = [row for row in read_rows(runs / "none_0/metrics.jsonl") if "train/loss" in row]
    assert [row["train/loss"] for row in rows[:3]] == pytest.approx(
        [row["train/loss"] for row in expected[:3]], rel=1e-3 if "bf16" in run else 1e-6
    )
    assert all(row["train/loss"] != before["train/loss"] for row, before in zip(rows[3:], expected[3:], strict=True))


@pytest.mark.distributed
def test_a_fault_that_stays_ends_the_run_on_all_ranks(runs: Path) -> None:
    words = [json.loads((runs / f"limit_{rank}.json").read_text()) for rank in (0, 1)]
    assert words[0] == words[1]
    assert "step 6 was skipped" in words[0] and "2 in a row" in words[0]
    assert sorted(path.name for path in (runs / "limit_2/checkpoints").iterdir())[-1] == "step_00000005"
    assert [json.loads((runs / f"again_{rank}.json").read_text()) for rank in (0, 1)] == [[5, 1], [5, 1]]
