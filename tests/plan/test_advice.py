"""Advice: what a switch is said to bring is what the whole prediction gives with it."""

from __future__ import annotations

import pytest

from moba_train.config import Config
from moba_train.model import planned_shape
from moba_train.plan.advice import switches, together, with_settings
from moba_train.plan.estimate import Estimate, estimate
from moba_train.plan.hardware import PlanConfig, hardware
from plan.cases import LLAMA_1B, LLAMA_8B, recipe


def predicted(config: Config, memory_gb: float) -> Estimate:
    return estimate(config, planned_shape(config.model), hardware(PlanConfig(memory_gb=memory_gb)))


@pytest.fixture
def config(tiny_config: Config) -> Config:
    planned = recipe(LLAMA_1B, 32768, tokens_per_step=32768 * 8, activation_checkpointing=False)
    planned.launch.gpus = 8
    planned.data = tiny_config.data
    return planned


def test_a_switch_by_itself(config: Config) -> None:
    before = predicted(config, 150)
    offered = switches(before, config)
    assert [switch.saved for switch in offered] == sorted((switch.saved for switch in offered), reverse=True)
    best = next(switch for switch in offered if switch.text == "train.activation_checkpointing=true")
    again = predicted(with_settings(config, {"train.activation_checkpointing": True}), 150)
    assert best.saved == before.needed - again.needed > 0 and best.slowdown == again.seconds / before.seconds > 1
    assert not config.train.activation_checkpointing


def test_switches_until_it_fits(config: Config) -> None:
    before = predicted(config, 8)
    steps = together(before, config)
    assert not before.fits and steps[-1].estimate.fits and len(steps) > 1
    assert not any(step.estimate.fits for step in steps[:-1])


def test_nothing_is_advised_to_what_fits(config: Config) -> None:
    assert together(predicted(config, 150), config) == []


def test_what_no_switch_makes_fit(config: Config) -> None:
    assert not together(predicted(config, 2), config)[-1].estimate.fits


def test_a_host_that_is_too_small_is_given_less(config: Config) -> None:
    """The GPU has room: what would put more on the host is no way, and there may be none."""
    config.train.offload.moments = True
    before = estimate(config, planned_shape(config.model), hardware(PlanConfig(memory_gb=150, host_memory_gb=1)))
    (step,) = together(before, config)
    assert not before.fits and step.text == "train.offload.moments=false" and step.estimate.fits
    short = hardware(PlanConfig(memory_gb=before.needed / 1e9 + 0.01, host_memory_gb=1))
    assert together(estimate(config, planned_shape(config.model), short), config) == []


def test_what_goes_to_the_host_must_fit_there(tiny_config: Config) -> None:
    """One GPU: the whole optimizer on a host of 137 GB would be 160 GB, its moments are 64."""
    config = recipe(LLAMA_8B | {"num_hidden_layers": 32}, 131072, zero_stage=3)
    config.data = tiny_config.data
    shape = planned_shape(config.model)
    known, unknown = (
        together(estimate(config, shape, hardware(PlanConfig(memory_gb=150, host_memory_gb=host))), config)
        for host in (137, None)
    )
    assert "train.offload.optimizer=cpu" in [step.text for step in unknown]
    assert known[0].text == "train.offload.moments=true" and known[-1].estimate.fits
