"""One optimizer step: a stage is entered, its rows become a loss by position, gradients and an update."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moba_train import hf_attention
from moba_train.batch import count_positions, model_inputs, valid_tokens
from moba_train.cost import StepCost, step_cost
from moba_train.data.loader import Batch, RowLoader
from moba_train.data.mix import stage_mix
from moba_train.data.survey import describe_draws, source_draws
from moba_train.metrics import PositionLoss
from moba_train.parallel.engine import backward, set_accumulation, step_engine
from moba_train.rope import rope_parameters, set_rope
from moba_train.run import Run, say
from moba_train.schedule import Stage, due
from moba_train.validate import micro_batch_rows


def enter(run: Run, stage: Stage) -> None:
    """Switch attention, RoPE, context length and accumulation, in place; optimizer state stays as it is."""
    config = run.config
    run.stage = stage
    hf_attention.set_plan(run.model, stage.plan(run.model.config.num_hidden_layers), config.attention.backend)
    set_rope(run.model, rope_at(run, stage), run.schedule.longest_context)
    rows_per_step = run.schedule.tokens_per_step // stage.context_length
    run.loader = RowLoader(
        run.store,
        stage.context_length,
        rows_per_step,
        run.runtime.data_parallel_rank,
        run.runtime.data_parallel_size,
        # Stages draw rows in orders of their own: a stage must not begin with the rows the one before began with.
        seed=config.run.seed + stage.index,
        mix=stage_mix(config, stage.index)[0],
    )
    run.loader.load_state_dict({"rows": (run.step - stage.first_step) * rows_per_step})
    group_rows = rows_per_step // run.runtime.data_parallel_size
    set_accumulation(run.engine, group_rows // micro_batch_rows(config, stage.context_length))
    run.bins = PositionLoss(stage.context_length, config.position_loss.bin_size, run.runtime.device)
    say(
        run,
        f"stage {stage.name}: steps {stage.first_step}-{stage.end_step}, context {stage.context_length}, "
        f"{stage.describe()}, {_packing(run, rows_per_step * stage.steps)}",
    )
    run.throughput.restart()


def rope_at(run: Run, stage: Stage) -> dict[str, Any]:
    """RoPE of a stage: each stage changes what the one before had, so it depends on the stage alone."""
    parameters = run.own_rope
    for earlier in run.schedule.stages[: stage.index + 1]:
        parameters = rope_parameters(parameters, earlier.rope)
    return parameters


def optimize(run: Run) -> dict[str, float]:
    """One optimizer step over ``tokens_per_step`` tokens; without an update where loss or gradient are not finite.

    Raises:
        FloatingPointError: the last of ``train.nonfinite_limit`` such steps in a row.
    """
    assert run.stage is not None
    run.watchdog.beat(f"step {run.step + 1}")
    with run.own_time.on_host():
        batches = run.loader.next_step(micro_batch_rows(run.config, run.stage.context_length))
    valid, cost = step_totals(run, batches)
    # DeepSpeed averages gradients over ranks; the loss is a mean over the valid tokens of all of them. A rank's share
    # may be rows or, under sequence parallelism, slices of rows: either way it is a share of one sum.
    scale = run.runtime.world_size / valid
    run.bins.reset()
    norm = math.nan
    for index, batch in enumerate(batches):
        run.watchdog.beat(f"step {run.step + 1}, micro-batch {index + 1} of {len(batches)}")
        inputs = model_inputs(batch, run.runtime)
        with run.own_time.on_device():
            loss, losses = run.engine(**inputs, scale=scale)
        backward(run.engine, loss)
        count_positions(run.bins, losses, inputs, batch)
        if index == len(batches) - 1:
            run.bins.all_reduce()
            row = run.bins.as_row("train", curve=due(run.step + 1, run.config.position_loss.log_every))
        norm = step_engine(run.engine, run.config.train)
    run.throughput.step(run.schedule.tokens_per_step, cost)
    run.skipped.note(run.step + 1, row["train/loss"], norm)
    return {**row, "train/gradient_norm": norm, "train/skipped_steps": run.skipped.total}


def step_totals(run: Run, batches: list[Batch]) -> tuple[int, StepCost]:
    """Valid tokens and cost of a step over all ranks, in one collective, before the first backward pass."""
    assert run.stage is not None
    lengths = np.concatenate([np.diff(batch.cu_seqlens.numpy()) for batch in batches])
    cost = step_cost(
        run.shape,
        run.stage.plan(run.shape.layers),
        lengths,
        activation_checkpointing=run.config.train.activation_checkpointing,
        keep_attention=run.config.train.keep_attention,
        keep_choices=run.config.train.keep_choices,
    )
    counts = [sum(map(valid_tokens, batches)), cost.model_flops, cost.hardware_flops]
    totals = torch.tensor(counts, dtype=torch.float64, device=run.runtime.device)
    dist.all_reduce(totals)
    totals /= run.runtime.sequence_parallel_size  # each rank of a group counts the group's rows
    valid, model_flops, hardware_flops = totals.tolist()
    if not valid:
        raise ValueError(
            "a step drew no token that is a target: the documents are too short, raise data.min_document_tokens"
        )
    return int(valid), StepCost(model_flops, hardware_flops)


def _packing(run: Run, rows: int) -> str:
    """What a stage of so many rows draws."""
    mix = run.loader.mix
    return (
        f"{len(mix.rows)} rows an epoch, {100 * mix.full_share:.0f} % of those drawn one full-length segment, "
        f"{100 * mix.padding_share:.1f} % padding; {describe_draws(source_draws(run.store, mix, rows))}"
    )
