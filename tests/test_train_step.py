"""What a step is told before its first pass: the RoPE of its stage, and how many of its tokens are targets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig

from moba_train import train_step
from moba_train.config import Config, RopeConfig, StageConfig
from moba_train.cost import DecoderShape, step_cost
from moba_train.data.loader import Batch, RowLoader
from moba_train.data.store import TokenStore
from moba_train.data.tokens import prepare_store
from moba_train.loss import IGNORE
from moba_train.runtime import Runtime
from moba_train.schedule import build_schedule
from moba_train.train_step import enter, rope_at, step_totals
from tiny import TINY_LLAMA


def test_each_stage_changes_the_rope_of_the_one_before(tiny_config: Config) -> None:
    changes = [RopeConfig(), RopeConfig(rope_theta=5e4), RopeConfig(rope_type="linear", factor=2.0), RopeConfig()]
    tiny_config.schedule.stages = [
        StageConfig(f"stage_{i}", tokens=512, context_length=128, rope=rope) for i, rope in enumerate(changes)
    ]
    schedule = build_schedule(tiny_config)
    run: Any = SimpleNamespace(schedule=schedule, own_rope={"rope_type": "default", "rope_theta": 1e4})
    own, based = run.own_rope, {"rope_type": "default", "rope_theta": 5e4}
    scaled = {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}
    assert [rope_at(run, stage) for stage in schedule.stages] == [own, based, scaled, scaled]


def test_a_stage_is_entered_whole(tiny_config: Config, monkeypatch) -> None:
    """Rank 1 of 2 goes on in the last stage's second step."""
    tiny_config.train.micro_batch_tokens = 256
    schedule = build_schedule(tiny_config)
    stores = prepare_store(tiny_config.data, str(tiny_config.model.tokenizer), progress=False)
    done: dict[str, Any] = {}
    monkeypatch.setattr(train_step.hf_attention, "set_plan", lambda model, *plan: done.update(plan=plan))
    monkeypatch.setattr(train_step, "set_rope", lambda model, *rope: done.update(rope=rope))
    monkeypatch.setattr(train_step, "set_accumulation", lambda engine, passes: done.update(passes=passes))
    run: Any = SimpleNamespace(
        config=tiny_config,
        schedule=schedule,
        runtime=Runtime(1, 2, 1, torch.device("cpu")),
        model=SimpleNamespace(config=SimpleNamespace(num_hidden_layers=3)),
        engine=None,
        own_rope={"rope_type": "default", "rope_theta": 1e4},
        store=TokenStore.open(stores / "train"),
        throughput=SimpleNamespace(restart=lambda: done.update(restarted=True)),
        step=5,
    )
    for stage, passes, rows in ((schedule.stages[1], 1, 2), (schedule.stages[0], 1, 20)):
        enter(run, stage)
        assert done["plan"] == (stage.plan(3), "auto")
        assert done["rope"] == (rope_at(run, stage), 256)
        assert done["passes"] == passes and done.pop("restarted")
        assert run.stage is stage and run.loader.state_dict() == {"rows": rows}
        assert run.bins.context_length == stage.context_length and run.bins.bin_size == 32
        own_order = RowLoader(run.store, stage.context_length, 512 // stage.context_length, 1, 2, seed=stage.index)
        own_order.load_state_dict({"rows": rows})
        assert torch.equal(run.loader.next_step(1)[0].input_ids, own_order.next_step(1)[0].input_ids)
    tiny_config.train.micro_batch_tokens = None
    enter(run, schedule.stages[0])
    assert done["passes"] == 2


def step_of(config: Config, sequence_parallel_size: int = 1) -> Any:
    stage = build_schedule(config).stages[0]
    runtime = Runtime(0, 2, 0, torch.device("cpu"), sequence_parallel_size)
    shape = DecoderShape.from_config(AutoConfig.for_model(**TINY_LLAMA))
    return SimpleNamespace(config=config, stage=stage, shape=shape, runtime=runtime)


def batch(labels: list[list[int]], bounds: list[int]) -> Batch:
    ids = torch.tensor(labels)
    return Batch(ids, ids, torch.zeros_like(ids), torch.tensor(bounds, dtype=torch.int32), ids.shape[1])


@pytest.mark.parametrize("size", [1, 2])
def test_targets_and_cost_are_counted_over_all_ranks_once(tiny_config: Config, monkeypatch, size: int) -> None:
    """Two ranks with two batches each; sharing the rows, both count the same ones."""
    monkeypatch.setattr(dist, "all_reduce", lambda totals: totals.mul_(2))
    batches = [batch([[IGNORE, 1, 2, IGNORE]], [0, 3, 4]), batch([[IGNORE, 4, IGNORE, 6]], [0, 2, 4, 4])]
    run = step_of(tiny_config, size)
    valid, cost = step_totals(run, batches)
    assert valid == 4 * 2 // size
    alone = step_cost(run.shape, run.stage.plan(3), [3, 1, 2, 2])
    assert cost.model_flops == pytest.approx(alone.model_flops * 2 / size)
    assert cost.hardware_flops == pytest.approx(alone.hardware_flops * 2 / size)


def test_a_step_without_a_target_is_refused(tiny_config: Config, monkeypatch) -> None:
    """A mean over none would make every parameter NaN."""
    monkeypatch.setattr(dist, "all_reduce", lambda totals: totals)
    with pytest.raises(ValueError, match=r"no token that is a target: .* raise data\.min_document_tokens"):
        step_totals(step_of(tiny_config), [batch([[IGNORE] * 4], [0, 1, 2, 3, 4])])
