from __future__ import annotations

from itertools import pairwise

import pytest

from moba_train.config import AttentionKind, Config, DecayShape, StageConfig, StageLearningRateConfig
from moba_train.schedule import build_schedule, due


def test_stages_follow_at_whole_steps(tiny_config: Config) -> None:
    schedule = build_schedule(tiny_config)
    assert [(s.name, s.first_step, s.end_step) for s in schedule.stages] == [("moba", 0, 4), ("full", 4, 6)]
    assert [schedule.stage_at(step).name for step in range(7)] == ["moba"] * 4 + ["full"] * 3
    assert schedule.total_tokens == 6 * 512
    assert schedule.longest_context == 256


def test_shares_are_of_the_run(tiny_config: Config) -> None:
    tiny_config.schedule.tokens = 100 * 512
    for stage, share in zip(tiny_config.schedule.stages, (0.9, 0.1), strict=True):
        stage.tokens, stage.share = None, share
    assert [s.steps for s in build_schedule(tiny_config).stages] == [90, 10]


def test_shares_of_a_run_of_one_step(tiny_config: Config) -> None:
    """Their tokens add up to less than 512 by rounding alone; each stage has a step nevertheless."""
    shares = (0.21, 0.09, 0.15, 0.2, 0.14, 0.21)
    tiny_config.schedule.tokens = 512
    assert sum(share * 512 for share in shares) < 512
    tiny_config.schedule.stages = [
        StageConfig(f"stage_{i}", share=share, context_length=128) for i, share in enumerate(shares)
    ]
    assert build_schedule(tiny_config).total_steps == 6


def test_plan_keeps_the_last_layers_full(tiny_config: Config) -> None:
    tiny_config.attention.full_layers = 1
    moba, full = build_schedule(tiny_config).stages
    assert [spec.kind for spec in moba.plan(3)] == ["moba", "moba", "full"]
    assert (moba.plan(3)[0].block_size, moba.plan(3)[0].top_k) == (16, 2)
    assert [spec.kind for spec in full.plan(3)] == ["full"] * 3
    assert moba.sparsity == pytest.approx(1 - 32 / 128)
    assert full.sparsity == 0
    assert moba.describe() == "moba 16 x 2 (last 1 layers full), sparsity 75.0 %"
    tiny_config.attention.full_layers = 0
    assert [stage.describe() for stage in build_schedule(tiny_config).stages] == [
        "moba 16 x 2, sparsity 75.0 %",
        "full",
    ]


def test_a_stage_overrides_the_runs_plan(tiny_config: Config) -> None:
    tiny_config.schedule.stages[0].attention.top_k = 5
    tiny_config.schedule.stages[0].attention.block_size = 8
    stage = build_schedule(tiny_config).stages[0]
    assert (stage.block_size, stage.top_k, stage.kind) == (8, 5, AttentionKind.moba)


@pytest.mark.parametrize("shape", list(DecayShape), ids=lambda shape: shape.name)
def test_learning_rate_warms_up_holds_and_decays(tiny_config: Config, shape: DecayShape) -> None:
    tiny_config.schedule.stages = [StageConfig("only", tokens=100 * 512, context_length=128)]
    rate = tiny_config.schedule.learning_rate
    rate.peak, rate.warmup_share, rate.decay_share, rate.final_ratio, rate.shape = 2.0, 0.1, 0.4, 0.25, shape
    values = [build_schedule(tiny_config).learning_rate(step) for step in range(100)]
    assert values[0] == pytest.approx(0.2)
    assert values[9:60] == pytest.approx([2.0] * 51)
    assert values[99] == pytest.approx(0.5)
    assert values[79] == pytest.approx(1.25)  # half of the decay: both shapes pass its middle
    early = {DecayShape.linear: (1.9625, 1.625), DecayShape.cosine: (1.997688, 1.780330)}[shape]
    assert (values[60], values[69]) == pytest.approx(early)  # a fortieth and a quarter of it
    assert all(a > b for a, b in pairwise(values[60:]))


def test_a_stage_may_have_its_own_learning_rate(tiny_config: Config) -> None:
    tiny_config.schedule.stages[1].learning_rate = StageLearningRateConfig(start=1.0, end=0.0)
    tiny_config.schedule.learning_rate.peak = 1.0
    schedule = build_schedule(tiny_config)
    assert [schedule.learning_rate(step) for step in (4, 5)] == pytest.approx([0.5, 0.0])


def _stage(config: Config, **changes: object) -> None:
    for name, value in changes.items():
        setattr(config.schedule.stages[0], name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.schedule.stages.clear(), "schedule.stages is empty"),
        (lambda c: _stage(c, share=0.5), r"stages\[0\] has tokens=2048 and share=0.5: give exactly one"),
        (lambda c: _stage(c, tokens=None), r"stages\[0\] has tokens=None and share=None: give exactly one"),
        (lambda c: _stage(c, tokens=0), r"stages\[0\].tokens=0: must be at least 1"),
        (lambda c: _stage(c, tokens=None, share=0.5), r"share=0.5 needs schedule.tokens"),
        (lambda c: _stage(c, tokens=None, share=1.5), r"share=1.5: must be above 0"),
        (lambda c: setattr(c.train, "tokens_per_step", 4096), r"tokens_per_step=4096 is more than the 3072 tokens of"),
        (lambda c: _stage(c, context_length=1), r"stages\[0\].context_length=1: must be at least 2 tokens"),
        (lambda c: _stage(c, context_length=100), r"stages\[0\].context_length=100 does not divide .*=512"),
        (lambda c: _stage(c, name="full"), "give each stage a name of its own"),
        (lambda c: setattr(c.train, "profile_steps", [6, 7]), r"train.profile_steps=\[6, 7\] with 6 steps: name steps"),
        (lambda c: setattr(c.attention, "top_k", 0), "attention.top_k=0: must be at least 1"),
        (
            lambda c: setattr(c.schedule.stages[0].attention, "block_size", 0),
            r"schedule.stages\[0\].attention.block_size=0: must be at least 1",
        ),
    ],
)
def test_bad_schedules_name_key_value_and_fix(tiny_config: Config, change, message: str) -> None:
    change(tiny_config)
    with pytest.raises(ValueError, match=message):
        build_schedule(tiny_config)


def test_shares_must_add_up(tiny_config: Config) -> None:
    tiny_config.schedule.tokens = 5120
    for stage in tiny_config.schedule.stages:
        stage.tokens, stage.share = None, 0.4
    with pytest.raises(ValueError, match=r"sum 0.8 of schedule.tokens=5120: together they must add up to 1"):
        build_schedule(tiny_config)


def test_the_run_keeps_its_length_however_the_stages_round(tiny_config: Config) -> None:
    tiny_config.schedule.tokens = 10 * 512
    tiny_config.schedule.stages = [StageConfig(f"s{i}", share=0.25, context_length=128) for i in range(4)]
    assert [stage.steps for stage in build_schedule(tiny_config).stages] == [2, 3, 3, 2]


def test_tokens_and_shares_make_the_whole_run(tiny_config: Config) -> None:
    tiny_config.schedule.tokens = 5120
    tiny_config.schedule.stages[0].tokens, tiny_config.schedule.stages[1].tokens = 2560, None
    tiny_config.schedule.stages[1].share = 0.5
    assert build_schedule(tiny_config).total_steps == 10
    tiny_config.schedule.stages[1].share = 0.9
    with pytest.raises(ValueError, match=r"2560 tokens of schedule.tokens=5120"):
        build_schedule(tiny_config)
    tiny_config.schedule.tokens = 0
    with pytest.raises(ValueError, match=r"schedule.tokens=0: must be at least 1"):
        build_schedule(tiny_config)


def test_a_total_that_the_stages_do_not_give_is_refused(tiny_config: Config) -> None:
    tiny_config.schedule.tokens = 4096
    with pytest.raises(ValueError, match=r"add up to 3072: set schedule.tokens=null"):
        build_schedule(tiny_config)


def test_what_comes_every_so_many_steps() -> None:
    assert [step for step in range(1, 10) if due(step, 3)] == [3, 6, 9]
    assert not any(due(step, 0) for step in range(10))


def test_the_smallest_and_the_whole_are_allowed(tiny_config: Config) -> None:
    tiny_config.schedule.tokens = tiny_config.train.tokens_per_step = 2
    tiny_config.schedule.stages = [StageConfig("only", share=1.0, context_length=2)]
    tiny_config.train.profile_steps = [1, 1]
    assert build_schedule(tiny_config).total_steps == 1
