"""Train, or sweep with --multirun: moba-train train [--multirun] [key=value ...]

moba-train train                                            the default recipe
moba-train train experiment=hybrid_90_10 attention.top_k=4  a recipe, with a setting changed
moba-train train --multirun attention.block_size=64,128     one run a value
moba-train train --multirun run.name=widths run.resume=auto attention.block_size=64,128
                                                            the same in runs/widths, to be gone on with
moba-train train launch=local launch.gpus=8                 8 processes, a GPU each; or launch=hostfile, launch=slurm
moba-train train launch.dry_run=true                        write the settings, print the exact command, start nothing
moba-train train --cfg job                                  print every setting, run nothing
"""

from __future__ import annotations

import math
import os
import signal
import sys
from datetime import datetime
from functools import partial
from pathlib import Path
from uuid import uuid4

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from moba_train import resolved, result_file
from moba_train.commands import sweep
from moba_train.commands.compose import run_hydra
from moba_train.config import Config
from moba_train.parallel import launch, started
from moba_train.parallel.supervise import INTERRUPTED
from moba_train.summary import print_summary
from moba_train.validate import validate

STOPPED = (*INTERRUPTED, 128 + signal.SIGINT)  # the exit codes of a run that was told to stop

console = Console()


def main(arguments: list[str]) -> int:
    codes: list[int] = []  # of a single run; the points of a sweep may run elsewhere
    os.environ[sweep.STARTED] = uuid4().hex
    folder = run_hydra("train", partial(point, codes), arguments)
    if folder is None:
        return codes[0] if codes else 0
    if not sweep.read(folder):
        raise ValueError("the sweep has no point: glob(…) chooses among the files of a config group; match some")
    if len(list(folder.glob(f"*/{result_file.FILE}"))) > 1:
        from moba_train import report

        say(f"sweep report: {report.build(folder)}")
    return sweep.exit_code(folder)


def point(codes: list[int], composed: DictConfig) -> float | None:
    """A single run, or a point of a sweep: its trailing loss, the sweepers' objective; infinite, the worst, where it
    failed or has none; None where a batch job is to come."""
    hydra = HydraConfig.get()
    error: str | None = None
    try:
        folder, code = run_one(resolved.to_config(composed))
    except ValueError as refusal:
        error, code = str(refusal), 2
        print(f"error: {error}", file=sys.stderr)
    codes.append(code)
    if hydra.mode is RunMode.MULTIRUN:
        sweep.note(Path(hydra.sweep.dir), hydra.job.num, code, error)
        if code in STOPPED:
            print(f"error: the sweep in {hydra.sweep.dir} ends here, since it was told to stop", file=sys.stderr)
            sys.exit(code)
    if not code and not result_file.is_there(folder):
        return None
    found = None if code else result_file.read(folder)["trailing_loss"]
    return math.inf if found is None else found  # a sweep goes on to its other points


def run_one(config: Config) -> tuple[Path, int]:
    """Validate, prepare the data, start the processes, and report. Returns the run directory and the exit code."""
    config.launch = launch.settle(config.launch)
    if started.follows(config.launch):
        return follow(config)
    validate(config)
    # torch, transformers and matplotlib take seconds to import: a mistyped setting is told before.
    from moba_train import checkpoint, preflight, report
    from moba_train.data.tokens import prepare_store
    from moba_train.model import tokenizer_path
    from moba_train.schedule import build_schedule

    schedule = build_schedule(config)
    folder = run_folder(config)
    if config.launch.dry_run:  # on whatever machine: the model, the data and the GPUs may be on others
        with preflight.open_folder(config, folder):
            return folder, launch.run(config.launch, folder / resolved.FILE)
    preflight.check_model(config, schedule)
    preflight.check_folder(config, folder)  # before the data is tokenised, which may take hours
    launch.check(config.launch)
    checkpoint.newest_whole(folder / "checkpoints")  # each process would find them all damaged, and say so
    for reason in preflight.dense_stages(config, schedule):
        say(f"warning: {reason}")
    stores = prepare_store(config.data, tokenizer_path(config.model))
    preflight.check_store(config, schedule, stores)
    with preflight.open_folder(config, folder) as claim:
        say(f"run directory: {folder}")
        if result_file.is_there(folder):
            say("the run is complete")
            code = 0
        else:
            code = launch.run(config.launch, folder / resolved.FILE, claim)
        if not code and not result_file.is_there(folder):
            return folder, 0  # a batch job that is to come
        if code:
            saved = checkpoint.list_checkpoints(folder / "checkpoints")
            named = config.run.name or HydraConfig.get().mode is RunMode.MULTIRUN
            again = "run.resume=auto" if named else f"run.name={folder.name} run.resume=auto"
            advice = f"; its checkpoints stand, {again} goes on from the newest" if saved else ""
            print(f"error: the run in {folder} ended with exit code {code}{advice}", file=sys.stderr)
            return folder, code
        print_summary(folder, console)
        say(f"report: {report.build(folder)}")
    return folder, 0


def follow(config: Config) -> tuple[Path, int]:
    """A rank other than 0 that something else has started: rank 0 does the rest, and says what is wrong."""
    folder = run_folder(config)
    started.wait_for(folder / resolved.FILE, resolved.to_yaml(config), config.launch.timeout_minutes)
    if result_file.is_there(folder):  # the run is complete
        return folder, 0
    return folder, launch.run(config.launch, folder / resolved.FILE)


def say(line: str) -> None:
    """One line as it is: a path is not cut at the console's width, nor are its brackets markup."""
    console.print(line, soft_wrap=True, markup=False)


def run_folder(config: Config) -> Path:
    """``run.dir/run.name``, a name made of the recipe and the time where none is given, or a sweep's own."""
    hydra = HydraConfig.get()
    if hydra.mode is RunMode.MULTIRUN:
        return Path(hydra.runtime.output_dir).resolve()
    name = config.run.name or f"{config.run.label}-{datetime.now():%Y%m%d-%H%M%S}"
    return Path(config.run.dir).expanduser().resolve() / name
