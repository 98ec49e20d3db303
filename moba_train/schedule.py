"""Tokens seen → stage and learning rate.

A run is a number of optimizer steps of ``train.tokens_per_step`` tokens each. Stages follow each other at step
boundaries, so a stage's size is rounded to whole steps. Everything here is a function of the step alone: a resumed
run asks the same questions and gets the same answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moba_train.attention.spec import AttentionSpec
from moba_train.config import (
    AttentionKind,
    Config,
    DecayShape,
    LearningRateConfig,
    RopeConfig,
    StageConfig,
    StageLearningRateConfig,
)
from moba_train.cost import sparsity

_ROUNDING = 1e-6  # of the sum of shares


@dataclass(frozen=True)
class Stage:
    """A span of steps ``first_step <= step < end_step`` at one context length, attention plan and RoPE."""

    index: int
    name: str
    first_step: int
    end_step: int
    context_length: int  # tokens
    kind: AttentionKind
    block_size: int  # tokens
    top_k: int  # blocks, the query's own included
    full_layers: int  # the last N layers
    rope: RopeConfig
    learning_rate: StageLearningRateConfig

    @property
    def steps(self) -> int:
        return self.end_step - self.first_step

    @property
    def sparsity(self) -> float:
        """Share of keys that the last query of a full context does not read, in the stage's sparse layers."""
        if self.kind is AttentionKind.full:
            return 0.0
        return sparsity(self.block_size, self.top_k, self.context_length)

    def plan(self, layers: int) -> list[AttentionSpec]:
        """One spec a layer; the last ``full_layers`` of them full."""
        full = AttentionSpec("full")
        if self.kind is AttentionKind.full:
            return [full] * layers
        sparse = AttentionSpec("moba", block_size=self.block_size, top_k=self.top_k)
        return [sparse] * (layers - self.full_layers) + [full] * self.full_layers

    def describe(self) -> str:
        """``full`` or ``moba 256 x 4 (last 2 layers full), sparsity 50.0 %``."""
        if self.kind is AttentionKind.full:
            return "full"
        tail = f" (last {self.full_layers} layers full)" if self.full_layers else ""
        return f"moba {self.block_size} x {self.top_k}{tail}, sparsity {100 * self.sparsity:.1f} %"


@dataclass(frozen=True)
class Schedule:
    """The stages of a run, in order, and the run's learning rate."""

    stages: tuple[Stage, ...]
    tokens_per_step: int
    learning_rate_config: LearningRateConfig

    @property
    def total_steps(self) -> int:
        return self.stages[-1].end_step

    @property
    def total_tokens(self) -> int:
        return self.total_steps * self.tokens_per_step

    @property
    def longest_context(self) -> int:
        return max(stage.context_length for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage that step ``step`` (from 0) belongs to; a finished run stays in its last stage."""
        for stage in self.stages:
            if step < stage.end_step:
                return stage
        return self.stages[-1]

    def learning_rate(self, step: int) -> float:
        """Learning rate of step ``step`` (from 0): warm-up, stable, decay; or the stage's own line."""
        c = self.learning_rate_config
        stage = self.stage_at(step)
        if (line := stage.learning_rate.line) is not None:
            start, end = line
            return c.peak * (start + (end - start) * (step - stage.first_step + 1) / stage.steps)
        warmup = round(c.warmup_share * self.total_steps)
        decay = round(c.decay_share * self.total_steps)
        if step < warmup:
            return c.peak * (step + 1) / warmup
        into_decay = step + 1 - (self.total_steps - decay)
        if into_decay <= 0:
            return c.peak
        fallen = into_decay / decay
        if c.shape is DecayShape.cosine:
            fallen = (1 - math.cos(math.pi * fallen)) / 2
        return c.peak * (1 - (1 - c.final_ratio) * fallen)


def build_schedule(config: Config) -> Schedule:
    """The schedule of a configuration.

    Raises:
        ValueError: a stage without exactly one of tokens and share, a share without ``schedule.tokens``, shares that
            do not add up to 1, a context length that does not divide a step, a step longer than all stages, or steps
            to trace that are none of the run's; the message names the key.
    """
    stages = config.schedule.stages
    if not stages:
        raise ValueError("schedule.stages is empty: give at least one stage, or take one of the experiment= recipes")
    _check_sizes(config)
    tokens_per_step = config.train.tokens_per_step
    whole = sum(_tokens(stage, config) for stage in stages)
    if whole < tokens_per_step * (1 - _ROUNDING):
        raise ValueError(
            f"train.tokens_per_step={tokens_per_step} is more than the {whole:.0f} tokens of schedule.stages: lower "
            f"it, or lengthen the schedule"
        )
    built: list[Stage] = []
    first, tokens = 0, 0.0
    for index, stage in enumerate(stages):
        key = f"schedule.stages[{index}]"
        if stage.context_length < 2:
            raise ValueError(f"{key}.context_length={stage.context_length}: must be at least 2 tokens")
        if tokens_per_step % stage.context_length:
            raise ValueError(
                f"{key}.context_length={stage.context_length} does not divide train.tokens_per_step={tokens_per_step}: "
                f"make tokens_per_step a multiple of it"
            )
        # The sum is rounded, not each stage by itself, so that the run keeps its length.
        tokens += _tokens(stage, config)
        end = max(first + 1, round(tokens / tokens_per_step))
        built.append(_stage(index, stage, first, end, config))
        first = end
    names = [stage.name for stage in built]
    if len(set(names)) != len(names):
        raise ValueError(f"schedule.stages have the names {names}: give each stage a name of its own")
    if config.train.profile_steps and config.train.profile_steps[1] > first:
        raise ValueError(f"train.profile_steps={config.train.profile_steps} with {first} steps: name steps of the run")
    return Schedule(tuple(built), tokens_per_step, config.schedule.learning_rate)


def _tokens(stage: StageConfig, config: Config) -> float:
    if stage.tokens is not None:
        return stage.tokens
    assert stage.share is not None and config.schedule.tokens is not None  # _check_sizes
    return stage.share * config.schedule.tokens


def _check_sizes(config: Config) -> None:
    total, shares, tokens = config.schedule.tokens, [], 0
    if total is not None and total < 1:
        raise ValueError(f"schedule.tokens={total}: must be at least 1")
    for index, stage in enumerate(config.schedule.stages):
        key = f"schedule.stages[{index}]"
        if (stage.tokens is None) == (stage.share is None):
            raise ValueError(f"{key} has tokens={stage.tokens} and share={stage.share}: give exactly one of them")
        if stage.tokens is not None:
            if stage.tokens < 1:
                raise ValueError(f"{key}.tokens={stage.tokens}: must be at least 1")
            tokens += stage.tokens
        if stage.share is not None:
            if not 0 < stage.share <= 1:
                raise ValueError(f"{key}.share={stage.share}: must be above 0 and at most 1")
            if total is None:
                raise ValueError(f"{key}.share={stage.share} needs schedule.tokens, the size of the whole run")
            shares.append(stage.share)
    if total is None:
        return
    if not shares and tokens != total:
        raise ValueError(f"schedule.tokens={total} and the stages' tokens add up to {tokens}: set schedule.tokens=null")
    if abs(tokens + sum(shares) * total - total) > _ROUNDING * total:
        given = f"shares {shares} with the sum {sum(shares):g}" + (f" and {tokens} tokens" if tokens else "")
        raise ValueError(
            f"schedule.stages have {given} of schedule.tokens={total}: together they must add up to 1, the whole run"
        )


def _stage(index: int, stage: StageConfig, first: int, end: int, config: Config) -> Stage:
    own, default = stage.attention, config.attention
    resolved = Stage(
        index=index,
        name=stage.name,
        first_step=first,
        end_step=end,
        context_length=stage.context_length,
        kind=own.kind or default.kind,
        block_size=default.block_size if own.block_size is None else own.block_size,
        top_k=default.top_k if own.top_k is None else own.top_k,
        full_layers=default.full_layers if own.full_layers is None else own.full_layers,
        rope=stage.rope,
        learning_rate=stage.learning_rate,
    )
    for name, least in (("block_size", 1), ("top_k", 1), ("full_layers", 0)):
        value = getattr(resolved, name)
        if value < least:
            where = f"attention.{name}" if getattr(own, name) is None else f"schedule.stages[{index}].attention.{name}"
            raise ValueError(f"{where}={value}: must be at least {least}")
    return resolved


def due(step: int, every: int) -> bool:
    """Whether what comes every so many steps comes after this one; 0 is never."""
    return bool(every) and step % every == 0
