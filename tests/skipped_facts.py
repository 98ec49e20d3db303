"""Runs in which a loss or a gradient of rank 1 is not finite: a script for both ranks.

    python skipped_facts.py RESOLVED FOLDER

The runs are FOLDER/<what>_<ZeRO stage and other switches>; the last words of the one that ends are
FOLDER/limit_<rank>.json, and FOLDER/again_<rank>.json the step and the skips in a row that it would go on with.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path

import torch

from moba_train import resolved, train, train_step
from moba_train.config import Config, OffloadDevice, Precision
from moba_train.run import Run, build
from moba_train.runtime import finish, start

# DeepSpeed has an optimizer of its own for each of these.
GRADIENT = ("0", "1 bf16", "1 bf16 cpu", "2", "3 bf16")


def planted(what: str, steps: tuple[int, ...], run_of: list[Run]):
    """``train_step.backward`` with a fault on rank 1: of the first pass of these steps, the loss is infinite, or all
    gradients of one parameter are NaN."""
    real, seen = train_step.backward, set()

    def backward(engine, loss: torch.Tensor) -> None:
        run = run_of[0]
        step = run.step + 1
        if run.runtime.rank != 1 or step not in steps or step in seen:
            real(engine, loss)
            return
        seen.add(step)
        if what == "loss":
            real(engine, loss + math.inf)  # whose own gradient is 0
            return
        parameter = next(engine.module.parameters())
        handle = parameter.register_hook(lambda gradient: torch.full_like(gradient, math.nan))
        real(engine, loss)
        handle.remove()

    return backward


def main(config: Config, folder: Path) -> None:
    runtime = start(config.launch)
    config.checkpoint.every_steps, config.checkpoint.keep = 1, 9
    real = train_step.backward
    for what, switches, steps, limit in [
        ("none", "0", (), 5),
        *(("loss", switches, (3, 4), 3) for switches in ("0", "2")),
        *(("gradient", switches, (3, 4), 3) for switches in GRADIENT),
        ("limit", "2", (3, 5, 6), 2),
    ]:
        own = copy.deepcopy(config)
        own.train.zero_stage, own.train.nonfinite_limit = int(switches[0]), limit
        own.train.precision = Precision.bf16 if "bf16" in switches else Precision.fp32
        own.train.offload.optimizer = OffloadDevice.cpu if "cpu" in switches else OffloadDevice.none
        where = folder / f"{what}_{switches}"
        where.mkdir(exist_ok=True)
        runs: list[Run] = [build(own, where, runtime)]
        train_step.backward = planted(what if what == "gradient" else "loss", steps, runs)
        try:
            train.train(runs[0])
        except FloatingPointError as error:
            (folder / f"limit_{runtime.rank}.json").write_text(json.dumps(str(error)))
            runs[0].watchdog.stop()
        train_step.backward = real
        runs[0].engine.destroy()
    again = build(own, where, runtime)  # the one that ended, from the checkpoint before its last step
    (folder / f"again_{runtime.rank}.json").write_text(json.dumps([again.step, again.skipped.in_a_row]))
    again.watchdog.stop()
    again.engine.destroy()
    finish()


if __name__ == "__main__":
    main(resolved.load(Path(sys.argv[1])), Path(sys.argv[2]))
