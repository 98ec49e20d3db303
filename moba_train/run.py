"""The parts of a run: how they are made, or found again in a checkpoint, and saved."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moba_train import checkpoint, resolved
from moba_train.assemble import assemble
from moba_train.config import Config, OffloadDevice
from moba_train.cost import DecoderShape
from moba_train.data.loader import Batch, RowLoader, heldout_batches
from moba_train.data.store import TokenStore
from moba_train.data.tokens import prepare_store
from moba_train.metrics import PositionLoss, Throughput, peak_flops
from moba_train.model import DTYPES, load_model, tokenizer_path
from moba_train.observe import OwnTime
from moba_train.parallel.engine import loading_in_parts
from moba_train.parallel.interruption import Interruption
from moba_train.parallel.sequence import sequence_group, share_rows
from moba_train.parallel.watchdog import Watchdog
from moba_train.runtime import Runtime, log, seed_everything
from moba_train.schedule import Schedule, Stage, build_schedule
from moba_train.skipped import SkippedSteps
from moba_train.tracking import Tracker

_MODEL_PLACES = ("model.path: ", "model.tokenizer: ")


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
    with _weights_where_wanted(config, runtime):
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
        _check_settings(newest, state, config)
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
        skipped=SkippedSteps(config.train.nonfinite_limit, state["skipped_steps"], state.get("skipped_in_a_row", 0)),
        step=state["step"],
    )
    if newest:  # last of all: nothing may draw a random number between this and the next step
        checkpoint.load(newest, engine, runtime)
        run.seconds_before = state["seconds"]
        run.throughput.tokens, run.throughput.seconds = state["training_tokens_and_seconds"]
        if (before := state["arithmetic"]) != (now := _arithmetic(runtime)):
            say(run, f"saved on {before} and resumed on {now}: equal up to rounding, not to the bit")
    return run


def _weights_where_wanted(config: Config, runtime: Runtime) -> AbstractContextManager:
    """What ``load_model`` is called in: files are read on the CPU, or in parts; random numbers are drawn on the device,
    where a billion take no second, and a CPU twenty. These are the same at any ZeRO stage."""
    if config.model.path is None:
        return nullcontext() if config.train.offload.parameters is not OffloadDevice.none else runtime.device
    return nullcontext() if config.model.gguf_file is not None else loading_in_parts(config.train, runtime)


def save(run: Run) -> None:
    """Commit a checkpoint. Stage, RoPE and rows follow from the step, so the step stands for them."""
    run.watchdog.beat(f"the checkpoint of step {run.step}")
    state = {
        "step": run.step,
        "settings": resolved.to_yaml(run.config),
        "stores": _contents(run.store, run.heldout),
        "seconds": run.seconds,
        "training_tokens_and_seconds": [run.throughput.tokens, run.throughput.seconds],
        "arithmetic": _arithmetic(run.runtime),
        "skipped_steps": run.skipped.total,
        "skipped_in_a_row": run.skipped.in_a_row,
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


def _check_settings(path: Path, state: dict[str, Any], config: Config) -> None:
    """A checkpoint that was copied here from another run has no resolved.yaml beside it that would tell. It may come
    from another machine, where files lie elsewhere: documents are known by their tokens, and it holds the weights."""
    if "settings" not in state:  # of an older moba_train
        return
    found = resolved.differences(resolved.from_yaml(state["settings"], path), config)
    if changed := [each for each in found if not each.startswith(_MODEL_PLACES)]:
        raise ValueError(
            f"{path} was saved by a run with other settings ({'; '.join(changed[:3])}): take the same, or choose "
            f"another run.name"
        )


def _contents(*stores: TokenStore) -> list[str]:
    return [store.manifest["sha256"] for store in stores]


def _check_stores(state: dict[str, Any], *stores: TokenStore) -> None:
    for store, before, now in zip(stores, state["stores"], _contents(*stores), strict=True):
        if before != now:
            raise ValueError(
                f"the token store {store.path} is not the one this run was started on (its tokens differ): restore the "
                f"documents, or choose another run.name"
            )
