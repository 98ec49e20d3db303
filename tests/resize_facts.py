"""Runs that go on with other sizes: what a checkpoint held, what was made of it, and the steps that followed.

    python resize_facts.py RESOLVED CASES FOLDER    # CASES: a JSON list, as ``case`` of test_resize.py makes them

A script for every rank. Each case is a run in FOLDER/<name>, from step 0 or from the step-2 checkpoint of ``source``,
the name of an earlier case. Rank 0 writes FOLDER/<name>.pt.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from moba_train import resolved, train, train_step
from moba_train import run as parts
from moba_train.config import Config, Precision, TrainConfig
from moba_train.metrics_file import read_rows
from moba_train.model import load_model
from moba_train.parallel.engine import loading_in_parts
from moba_train.run import Run, build
from moba_train.runtime import Runtime, finish, start

SAVED = 2  # the step whose checkpoint is gone on from


def engine_state(engine) -> dict[str, torch.Tensor]:
    """Every parameter and moment, whole, in fp32, and the count of steps of each; all ranks call it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found: dict[str, torch.Tensor] = {}
    sharded = engine.zero_optimization_stage() > 0
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # ZeRO 1 and 2 look for the moments before the first step, when torch's AdamW has none, and not again.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if sharded:
            found[name] = safe_get_full_fp32_param(parameter)
        else:
            found[name] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            if sharded:
                found[f"{name} {moment}"] = safe_get_full_optimizer_state(parameter, moment)
            else:
                found[f"{name} {moment}"] = engine.optimizer.state[parameter][moment]
    base = engine.optimizer.optimizer if sharded else engine.optimizer
    steps = {float(state["step"]) for state in base.state.values()}
    assert len({id(state["step"]) for state in base.state.values()}) == len(base.state), "each counts for itself"
    found["step"] = torch.tensor(sorted(steps))
    found["weight_decay"] = torch.tensor([group["weight_decay"] for group in base.param_groups])
    return {name: value.clone() for name, value in found.items()}


def parameters(engine) -> dict[str, torch.Tensor]:
    """Whole, as the model computes with them; all ranks call it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def watch_loading() -> list[int]:
    """Fills with the numbers that this rank has of the model that is loaded next."""
    load_model, numbers = parts.load_model, []

    def watched(*arguments):
        model = load_model(*arguments)
        numbers.append(sum(getattr(each, "ds_tensor", each).numel() for each in model.parameters()))
        parts.load_model = load_model
        return model

    parts.load_model = watched
    return numbers


def refusal(config: Config, runtime: Runtime) -> str | None:
    """What loading the model in parts says against it; rank 0 alone finds it."""
    with loading_in_parts(config.train, runtime):
        try:
            load_model(config.model, config.train.precision)
        except ValueError as error:
            return str(error)
    return None


def facts(run: Run) -> dict:
    """Train to the end, and watch."""
    found: dict = {"begun": engine_state(run.engine) if run.step else None, "initial": parameters(run.engine)}
    rows: dict[int, list[torch.Tensor]] = {}
    save, model_inputs = train.save, train_step.model_inputs

    def watched_save(run: Run) -> None:
        if run.step == SAVED:
            found["saved"] = engine_state(run.engine)
        save(run)

    def watched_inputs(batch, runtime):
        if runtime.sequence_parallel_rank == 0:
            rows.setdefault(run.step, []).append(batch.input_ids)
        return model_inputs(batch, runtime)

    train.save, train_step.model_inputs = watched_save, watched_inputs
    train.train(run)
    train.save, train_step.model_inputs = save, model_inputs
    shares: list = [None] * run.runtime.world_size
    dist.all_gather_object(shares, rows)
    found["tokens"] = {
        step: hashlib.sha256(torch.cat([r for share in shares for r in share.get(step, [])]).numpy()).hexdigest()
        for step in rows
    }
    return found


def main(config: Config, cases: list[dict], folder: Path) -> None:
    runtime = start(config.launch)
    for case in cases:
        own = copy.deepcopy(config)
        changed = OmegaConf.merge(OmegaConf.structured(own.train), case["train"])
        own.train = cast(TrainConfig, OmegaConf.to_object(changed))
        own.train.precision = Precision[case.get("precision", "fp32")]
        if case.get("path"):
            own.model.path, own.model.architecture = case["path"], {}
        if case.get("refused"):
            message = refusal(own, runtime)
            if runtime.is_main:
                torch.save(message, folder / f"{case['name']}.pt")
            continue
        where = folder / case["name"]
        if runtime.is_main:
            where.mkdir()
            if case["source"]:
                kept = f"checkpoints/step_{SAVED:08d}"
                shutil.copytree(folder / case["source"] / kept, where / kept)
                shutil.copy(folder / case["source"] / "metrics.jsonl", where)
        dist.barrier()
        loaded = watch_loading()
        run = build(own, where, dataclasses.replace(runtime, sequence_parallel_size=own.train.sequence_parallel_size))
        found = facts(run) | {"loaded": loaded[0]}
        if runtime.is_main:
            found["rows"] = [row for row in read_rows(where / "metrics.jsonl") if row["step"] > SAVED]
            torch.save(found, folder / f"{case['name']}.pt")
        run.engine.destroy()
    finish()


if __name__ == "__main__":
    main(resolved.load(Path(sys.argv[1])), json.loads(sys.argv[2]), Path(sys.argv[3]))
