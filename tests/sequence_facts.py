"""Losses and gradients of one optimizer step in each stage, under sequence parallelism: a script for every rank.

    python sequence_facts.py RESOLVED CASES FOLDER    # CASES: a JSON list of {"name", "train": {…}, "kv_heads"}

Each case is a run of its own (``build``), so the steps and the reading of the held-out rows are the real ones;
the learning rate stays 0, so that every step sees the same weights. Rank 0 writes FOLDER/<name>.pt.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from moba_train import resolved, train, train_step
from moba_train.config import Config
from moba_train.metrics_file import read_rows
from moba_train.run import Run, build
from moba_train.runtime import finish, start


def gradients(engine) -> dict[str, torch.Tensor]:
    """Of every parameter, whole, averaged over the ranks; between a step's last backward pass and its update."""
    from deepspeed.utils import safe_get_full_grad

    sharded = engine.zero_optimization_stage() > 0
    return {
        name: (safe_get_full_grad(parameter) if sharded else parameter.grad).detach().clone()
        for name, parameter in engine.module.named_parameters()
    }


def refuse_scattered_tensors() -> None:
    """As NCCL does and gloo does not."""

    def strict(collective: Callable) -> Callable:
        @functools.wraps(collective)
        def call(*arguments, **keywords):
            flat = torch.utils._pytree.tree_leaves((arguments, keywords))
            shapes = [tuple(x.shape) for x in flat if isinstance(x, torch.Tensor) and not x.is_contiguous()]
            assert not shapes, f"{collective.__name__} is given tensors that are not contiguous, of {shapes}"
            return collective(*arguments, **keywords)

        return call

    for name in ("all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all_single", "reduce_scatter_tensor"):
        setattr(torch.distributed, name, strict(getattr(torch.distributed, name)))


def facts(run: Run) -> dict:
    """What the first step of each stage gives, and the held-out rows under its attention."""
    found: dict = {}
    seen: dict = {}
    step_engine, model_inputs = train_step.step_engine, train_step.model_inputs

    def watched_step(engine, settings):
        if engine.is_gradient_accumulation_boundary():
            seen["gradients"] = gradients(engine)
        return step_engine(engine, settings)

    def watched_inputs(batch, runtime):
        seen["segments"] += [int((row == 0).sum()) for row in batch.position_ids]
        return model_inputs(batch, runtime)

    train_step.step_engine, train_step.model_inputs = watched_step, watched_inputs
    for stage in run.schedule.stages:
        seen["segments"] = []
        run.step = stage.first_step
        train_step.enter(run, stage)
        seen["row"] = train_step.optimize(run)
        train.evaluate(run, "step")
        found[stage.name] = dict(seen)
    train_step.step_engine, train_step.model_inputs = step_engine, model_inputs
    return {"stages": found, "tokens": run.throughput.tokens, "rates": run.throughput.as_row()}


def main(config: Config, cases: list[dict], folder: Path) -> None:
    runtime = start(config.launch)
    refuse_scattered_tensors()
    for case in cases:
        own = copy.deepcopy(config)
        own.train = dataclasses.replace(own.train, **case["train"])
        own.model.architecture["num_key_value_heads"] = case["kv_heads"]
        run_folder = folder / case["name"]
        run_folder.mkdir(exist_ok=True)
        run = build(
            own, run_folder, dataclasses.replace(runtime, sequence_parallel_size=own.train.sequence_parallel_size)
        )
        found = facts(run)
        if runtime.is_main:
            found["heldout"] = list(read_rows(run_folder / "metrics.jsonl"))
            torch.save(found, folder / f"{case['name']}.pt")
        run.engine.destroy()  # or its hooks would outlive it
    finish()


if __name__ == "__main__":
    main(resolved.load(Path(sys.argv[1])), json.loads(sys.argv[2]), Path(sys.argv[3]))
