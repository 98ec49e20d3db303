"""A training run: ``build`` the parts, then ``train`` in a loop that reads from top to bottom."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from moba_train import checkpoint, hf_attention
from moba_train.assemble import assemble
from moba_train.batch import count_positions, model_inputs, valid_tokens
from moba_train.config import Config
from moba_train.cost import DecoderShape, StepCost, step_cost
from moba_train.data.loader import Batch, RowLoader, heldout_batches
from moba_train.data.mix import stage_mix
from moba_train.data.store import TokenStore
from moba_train.data.survey import describe_draws, source_draws
from moba_train.data.tokens import prepare_store
from moba_train.evaluate.position_loss import position_loss
from moba_train.export import export
from moba_train.metrics import PositionLoss, Throughput, memory_gb, peak_flops
from moba_train.model import DTYPES, load_model, tokenizer_path
from moba_train.observe import OwnTime, Peers, Stragglers, exchange
from moba_train.optimizer import set_learning_rate
from moba_train.parallel.engine import backward, set_accumulation, step_engine
from moba_train.parallel.interruption import Interrupted, Interruption
from moba_train.parallel.sequence import sequence_group, share_rows
from moba_train.parallel.watchdog import Watchdog
from moba_train.profiler import StepProfiler
from moba_train.rope import rope_parameters, set_rope
from moba_train.runtime import Runtime, log, seed_everything
from moba_train.schedule import Schedule, Stage, build_schedule
from moba_train.skipped import SkippedSteps
from moba_train.tracking import Tracker, format_progress
from moba_train.validate import micro_batch_rows


@dataclass
class Run:
    """The parts of a run, and where it is."""

    config: Config
    folder: Path
    runtime: Runtime
    schedule: Schedule
    model: PreTrainedModel
    engine: Any  # deepspeed.DeepSpeedEngine around TokenLosses(model)
    store: TokenStore  # to train on
    heldout: TokenStore
    heldout_batches: list[Batch]  # this rank's share
    tracker: Tracker | None  # rank 0's
    throughput: Throughput
    own_time: OwnTime
    interruption: Interruption
    watchdog: Watchdog
    skipped: SkippedSteps
    own_rope: dict[str, Any]  # rope_parameters as loaded, before any stage
    step: int = 0  # optimizer steps done
    seconds_before: float = 0.0  # of the processes that this one goes on from
    began: float = field(default_factory=time.monotonic)
    stage: Stage | None = None
    loader: RowLoader = field(init=False)  # of the stage
    bins: PositionLoss = field(init=False)  # of the stage

    @cached_property
    def shape(self) -> DecoderShape:
        return DecoderShape.from_config(self.model.config)

    @property
    def tokens(self) -> int:
        return self.step * self.schedule.tokens_per_step

    @property
    def seconds(self) -> float:
        """Since the first start, interruptions left out."""
        return self.seconds_before + time.monotonic() - self.began

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


def build(config: Config, folder: Path, runtime: Runtime) -> Run:
    """Load or resume everything a step needs. Reads; writes nothing but metrics.jsonl's cut to the resumed step."""
    seed_everything(config.run.seed)
    schedule = build_schedule(config)
    model = load_model(config.model, config.train.precision, config.attention.key_conv)
    own_rope = dict(model.config.rope_parameters)
    engine = assemble(model, config, runtime)
    if runtime.sequence_parallel_size > 1:
        share_rows(model, sequence_group(runtime, timedelta(minutes=config.launch.timeout_minutes)))
    stores = prepare_store(config.data, tokenizer_path(config.model), progress=False)
    store, heldout = (TokenStore.open(stores / split) for split in ("train", "heldout"))
    newest = checkpoint.newest_for_all(folder / "checkpoints", runtime)
    state: dict[str, Any] = checkpoint.read_state(newest) if newest else {"step": 0, "skipped_steps": 0}
    if newest:  # before anything in the run directory is touched
        _check_stores(state, store, heldout)
    run = Run(
        config=config,
        folder=folder,
        runtime=runtime,
        schedule=schedule,
        model=model,
        engine=engine,
        store=store,
        heldout=heldout,
        heldout_batches=heldout_batches(
            heldout,
            schedule.longest_context,
            config.evaluate.rows,
            runtime.data_parallel_rank,
            runtime.data_parallel_size,
        ),
        tracker=Tracker(folder, config.wandb, asdict(config), state["step"]) if runtime.is_main else None,
        throughput=Throughput(peak_flops(runtime.device, DTYPES[config.train.precision]) * runtime.world_size),
        own_time=OwnTime(runtime.device),
        interruption=Interruption(),
        watchdog=Watchdog(runtime.rank, config.launch.timeout_minutes),
        own_rope=own_rope,
        skipped=SkippedSteps(config.train.nonfinite_limit, state["skipped_steps"]),
        step=state["step"],
    )
    if newest:  # last of all: nothing may draw a random number between this and the next step
        checkpoint.load(newest, engine, runtime)
        run.seconds_before = state["seconds"]
        run.throughput.tokens, run.throughput.seconds = state["training_tokens_and_seconds"]
        if (before := state["arithmetic"]) != (now := _arithmetic(runtime)):
            say(run, f"saved on {before} and resumed on {now}: equal up to rounding, not to the bit")
    return run


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
        if last or peers.signal or _due(run.step, config.checkpoint.every_steps):
            save(run)
        if peers.signal and not last:
            raise Interrupted(peers.signal, run.step)

    # A run that was resumed when all its steps were done entered no stage; the export needs the last one's RoPE.
    set_rope(run.model, rope_at(run, schedule.stages[-1]), schedule.longest_context)
    run.watchdog.stop()  # the others wait for rank 0 to write, under the collectives' own time-out
    if config.checkpoint.export:
        with run.throughput.pause():
            export(run.model, tokenizer_path(config.model), run.folder / "model", run.runtime)


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
            row = run.bins.as_row("train", curve=_due(run.step + 1, run.config.position_loss.log_every))
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
        tiled_loss=run.config.train.zero_stage == 3,
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
        raise FloatingPointError(
            f"the held-out loss at step {run.step} is {row['eval/loss']}: lower schedule.learning_rate.peak, or look "
            f"at the model; resume goes on from the last checkpoint"
        )
    log_row(run, {**row, "eval/point": point})


def log_step(run: Run, row: dict[str, Any], peers: Peers) -> None:
    assert run.stage is not None
    perf = {
        **run.throughput.as_row(),
        "perf/memory_gb": memory_gb(run.runtime.device),
        **peers.as_row(),
        "perf/sparsity": run.stage.sparsity,
        "perf/data_seconds": run.loader.waited,
        **run.loader.as_row(),
    }
    log_row(run, {**row, **perf}, quiet=not _due(run.step, run.config.train.log_every))


def log_row(run: Run, row: dict[str, Any], quiet: bool = False) -> None:
    """One row to metrics.jsonl and W&B, and as a line on the console."""
    row = {"tokens": run.tokens, "stage": run.stage.name if run.stage else "start", **row}
    if run.tracker:
        run.tracker.log(row, run.step)
        if not quiet:
            eta = run.throughput.eta_seconds(run.schedule.total_tokens - run.tokens)
            print(format_progress({"step": run.step, **row}, run.schedule.total_tokens, eta), flush=True)


def save(run: Run) -> None:
    """Commit a checkpoint. Stage, RoPE and rows follow from the step, so the step stands for them."""
    run.watchdog.beat(f"the checkpoint of step {run.step}")
    state = {
        "step": run.step,
        "stores": _contents(run.store, run.heldout),
        "seconds": run.seconds,
        "training_tokens_and_seconds": [run.throughput.tokens, run.throughput.seconds],
        "arithmetic": _arithmetic(run.runtime),
        "skipped_steps": run.skipped.total,
    }
    with run.throughput.pause():
        checkpoint.save(run.checkpoints, run.engine, state, run.config.checkpoint.keep, run.runtime)


def say(run: Run, text: str) -> None:
    if run.runtime.is_main:
        log.info("%s", text)


def _arithmetic(runtime: Runtime) -> str:
    """What decides the order of sums: a run that goes on under the same equals an uninterrupted one to the bit."""
    if runtime.device.type == "cuda":
        return torch.cuda.get_device_name(runtime.device)
    return f"cpu, {torch.get_num_threads()} threads"


def _contents(*stores: TokenStore) -> list[str]:
    return [store.manifest["sha256"] for store in stores]


def _check_stores(state: dict[str, Any], *stores: TokenStore) -> None:
    for store, before, now in zip(stores, state["stores"], _contents(*stores), strict=True):
        if before != now:
            raise ValueError(
                f"the token store {store.path} is not the one this run was started on (its tokens differ): restore the "
                f"documents, or choose another run.name"
            )


def _packing(run: Run, rows: int) -> str:
    """What a stage of so many rows draws."""
    mix = run.loader.mix
    return (
        f"{len(mix.rows)} rows an epoch, {100 * mix.full_share:.0f} % of those drawn one whole document part, "
        f"{100 * mix.padding_share:.1f} % padding; {describe_draws(source_draws(run.store, mix, rows))}"
    )


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
