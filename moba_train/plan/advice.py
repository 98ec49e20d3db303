"""Which settings make a recipe smaller, and at what cost: the whole prediction again with each."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moba_train.config import Config, OffloadDevice, Precision
from moba_train.plan.estimate import Estimate, estimate
from moba_train.plan.setup import refuse
from moba_train.validate import validate

_SMALLEST = 1e8  # bytes saved below which a switch is not worth a line
_MOST_TOGETHER = 8
_CHANGE_RESULTS = {"train.gradient_dtype"}  # shown, not advised
_MLP_TILE, _LOSS_TILE = 8192, 512  # tokens


@dataclass(frozen=True)
class Switch:
    """A setting changed, and the recipe with it."""

    settings: dict[str, Any]
    config: Config
    estimate: Estimate
    before: Estimate

    @property
    def text(self) -> str:
        """As on the command line."""
        return " ".join(f"{key}={_written(value)}" for key, value in self.settings.items())

    @property
    def saved(self) -> float:
        """Bytes of a GPU's memory."""
        return self.before.needed - self.estimate.needed

    @property
    def slowdown(self) -> float:
        """Time of the schedule over what it was."""
        return self.estimate.seconds / self.before.seconds


def switches(before: Estimate, config: Config) -> list[Switch]:
    """Every switch that saves memory, by itself, the one that saves most first."""
    found = [switch for settings in _candidates(config) if (switch := _try(settings, config, before)) is not None]
    return sorted((switch for switch in found if switch.saved > _SMALLEST), key=lambda switch: -switch.saved)


def together(before: Estimate, config: Config) -> list[Switch]:
    """Switches one after the other until the recipe fits: the fastest that suffices, else the one that saves most.

    Where the host alone has too little, one that puts more there is no step: there is one that suffices, or none.

    Returns:
        The steps; the last one's estimate may still not fit, where nothing more helps.
    """
    steps: list[Switch] = []
    while not before.fits and len(steps) < _MOST_TOGETHER:
        offered = [switch for switch in switches(before, config) if not switch.settings.keys() & _CHANGE_RESULTS]
        if before.fits_gpu:
            tried = (_try(settings, config, before) for settings in _taken_back(config))
            offered = [switch for switch in (*offered, *filter(None, tried)) if switch.estimate.fits]
        offered = [switch for switch in offered if switch.estimate.fits_host] or offered
        if not offered:
            break
        enough = [switch for switch in offered if switch.estimate.fits]
        step = min(enough, key=lambda switch: switch.slowdown) if enough else offered[0]
        steps.append(step)
        before, config = step.estimate, step.config
    return steps


def _candidates(config: Config) -> Iterator[dict[str, Any]]:
    """Each with what it rests on."""
    train, offload, ranks = config.train, config.train.offload, config.launch.world_size
    checkpointed = {} if train.activation_checkpointing else {"train.activation_checkpointing": True}
    if ranks > 1:
        yield from ({"train.zero_stage": stage} for stage in range(train.zero_stage + 1, 4))
        sizes = [size for size in (2, 4, 8, 16, 32, 64) if size > train.sequence_parallel_size and ranks % size == 0]
        yield from ({"train.sequence_parallel_size": size} for size in sizes)
    if checkpointed:
        yield checkpointed
    if train.keep_attention:
        yield {"train.keep_attention": False}
    if train.keep_choices and train.activation_checkpointing:
        yield {"train.keep_choices": False}
    if not offload.hidden_states:
        yield {**checkpointed, "train.offload.hidden_states": True}
    if offload.optimizer is OffloadDevice.none and not offload.moments:
        yield {"train.offload.moments": True}
    if offload.optimizer is OffloadDevice.none:
        moments = {"train.offload.moments": False} if offload.moments else {}
        stage = {} if train.zero_stage >= 2 else {"train.zero_stage": 2}
        yield {**stage, **moments, "train.offload.optimizer": OffloadDevice.cpu}
    if offload.parameters is OffloadDevice.none:
        stage = {} if train.zero_stage == 3 else {"train.zero_stage": 3}
        yield {**stage, "train.offload.parameters": OffloadDevice.cpu}
    if not train.mlp_tile_tokens:
        yield {"train.mlp_tile_tokens": _MLP_TILE}
    if train.loss_tile_tokens > _LOSS_TILE:
        yield {"train.loss_tile_tokens": _LOSS_TILE}
    if train.micro_batch_tokens is not None:
        yield {"train.micro_batch_tokens": None}
    if train.gradient_dtype is Precision.fp32:
        yield {"train.gradient_dtype": Precision.bf16}


def _taken_back(config: Config) -> Iterator[dict[str, Any]]:
    """What the host has, back to the GPU: each part, then all."""
    offload = config.train.offload
    parts: dict[str, Any] = {}
    if offload.moments:
        parts["train.offload.moments"] = False
    if offload.hidden_states:
        parts["train.offload.hidden_states"] = False
    if offload.optimizer is not OffloadDevice.none:
        parts["train.offload.optimizer"] = OffloadDevice.none
    if offload.parameters is not OffloadDevice.none:
        parts["train.offload.parameters"] = OffloadDevice.none
    yield from ({key: value} for key, value in parts.items())
    yield parts


def _try(settings: dict[str, Any], config: Config, before: Estimate) -> Switch | None:
    """None where the settings do not go together."""
    changed = with_settings(config, settings)
    shape = before.stages[0].setup.shape
    try:
        validate(changed)
        refuse(changed, shape)
    except ValueError:
        return None
    after = estimate(changed, shape, before.hardware)
    return Switch(settings, changed, after, before)


def with_settings(config: Config, settings: dict[str, Any]) -> Config:
    """A copy with dotted keys set."""
    changed = copy.deepcopy(config)
    for key, value in settings.items():
        *groups, name = key.split(".")
        group: Any = changed
        for each in groups:
            group = getattr(group, each)
        assert hasattr(group, name), key
        setattr(group, name, value)
    return changed


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(getattr(value, "name", value))
