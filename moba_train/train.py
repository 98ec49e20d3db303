"""A training run, readable from top to bottom: step, log, evaluate, save, and the export at the end."""

from __future__ import annotations

import math
from typing import Any

from moba_train import hf_attention
from moba_train.evaluate.position_loss import position_loss
from moba_train.export import export
from moba_train.metrics import memory_gb
from moba_train.model import tokenizer_path
from moba_train.observe import Peers, Stragglers, exchange
from moba_train.optimizer import set_learning_rate
from moba_train.parallel.interruption import Interrupted
from moba_train.profiler import StepProfiler
from moba_train.rope import set_rope
from moba_train.run import Run, save, say
from moba_train.schedule import due
from moba_train.tracking import format_progress
from moba_train.train_step import enter, optimize, rope_at


def train(run: Run) -> None:
    """Step to the end of the schedule: every stage, its evaluations and checkpoints, and the export.

    Raises:
        Interrupted: some rank was told to stop; the last whole step is saved.
    """
    config, schedule = run.config, run.schedule
    stragglers, profiler = Stragglers(run.runtime), StepProfiler(config.train.profile_steps, run.folder, run.runtime)
    slowest = 0
    if run.step:
        say(run, f"resumed at step {run.step} of {schedule.total_steps}")
    elif config.evaluate.at_start:
        evaluate(run, "start")

    while run.step < schedule.total_steps:
        stage = schedule.stage_at(run.step)
        if stage is not run.stage:
            enter(run, stage)
        rate = schedule.learning_rate(run.step)
        set_learning_rate(run.engine.optimizer, rate)

        profiler.before(run.step + 1, slowest)
        row = optimize(run)
        run.step += 1
        with run.throughput.pause():
            profiler.after(run.step)

        peers = exchange(run.runtime, run.own_time.take(), memory_gb(run.runtime.device), run.interruption.number)
        slowest = peers.slowest
        if run.runtime.is_main:
            stragglers.note(peers)
        log_step(run, {**row, "train/learning_rate": rate}, peers)
        if run.step == stage.end_step:
            evaluate(run, stage.name)
        elif config.evaluate.every_steps and run.step % config.evaluate.every_steps == 0:
            evaluate(run, "step")
        last = run.step == schedule.total_steps
        if last or peers.signal or due(run.step, config.checkpoint.every_steps):
            save(run)
        if peers.signal and not last:
            raise Interrupted(peers.signal, run.step)

    # A run that was resumed when all its steps were done entered no stage; the export needs the last one's RoPE.
    set_rope(run.model, rope_at(run, schedule.stages[-1]), schedule.longest_context)
    run.watchdog.stop()  # the others wait for rank 0 to write, under the collectives' own time-out
    if config.checkpoint.export:
        with run.throughput.pause():
            export(run.model, tokenizer_path(config.model), run.folder / "model", run.runtime)


def evaluate(run: Run, point: str) -> None:
    """Read the held-out rows. At the start that is the model as it came: its own RoPE, full attention."""
    run.watchdog.beat(f"the evaluation at step {run.step}")
    context = run.schedule.longest_context
    if point == "start":
        full = hf_attention.AttentionSpec("full")
        hf_attention.set_plan(run.model, [full] * run.model.config.num_hidden_layers, run.config.attention.backend)
        set_rope(run.model, run.own_rope, context)
    with run.throughput.pause():
        bin_size = run.config.position_loss.bin_size
        row = dict(position_loss(run.engine.module, run.heldout_batches, context, bin_size, run.runtime))
    if not math.isfinite(row["eval/loss"]):
        fix = "lower schedule.learning_rate.peak, or look at the model; resume goes on from the last checkpoint"
        if not run.step:
            fix = "the model came so: look at its weights, or take another model.path"
        raise FloatingPointError(f"the held-out loss at step {run.step} is {row['eval/loss']}: {fix}")
    log_row(run, {**row, "eval/point": point})


def log_step(run: Run, row: dict[str, Any], peers: Peers) -> None:
    """The row of a training step: its losses and learning rate in ``row``, and how fast it was on all ranks."""
    assert run.stage is not None
    perf = {
        **run.throughput.as_row(),
        "perf/memory_gb": memory_gb(run.runtime.device),
        **peers.as_row(),
        "perf/sparsity": run.stage.sparsity,
        "perf/data_seconds": run.loader.waited,
        **run.loader.as_row(),
    }
    log_row(run, {**row, **perf}, quiet=not due(run.step, run.config.train.log_every))


def log_row(run: Run, row: dict[str, Any], quiet: bool = False) -> None:
    """One row to metrics.jsonl and W&B, and as a line on the console."""
    row = {"tokens": run.tokens, "stage": run.stage.name if run.stage else "start", **row}
    if run.tracker:
        run.tracker.log(row, run.step)
        if not quiet:
            eta = run.throughput.eta_seconds(run.schedule.total_tokens - run.tokens)
            print(format_progress({"step": run.step, **row}, run.schedule.total_tokens, eta), flush=True)
