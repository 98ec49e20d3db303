"""What DeepSpeed's engine does with our settings, as JSON on the last line. A script: one engine a process is the rule
(moba_train/parallel/launch.py), and several here are only safe because nothing but numbers leaves it.

    python engine_facts.py ZERO_STAGE PRECISION OFFLOADED_OPTIMIZER OFFLOADED_PARAMETERS
"""

from __future__ import annotations

import json
import math
import sys

import torch
from torch import nn

from moba_train.config import (
    Device,
    LaunchConfig,
    OffloadConfig,
    OffloadDevice,
    OptimizerConfig,
    Precision,
    TrainConfig,
)
from moba_train.optimizer import build_optimizer, set_learning_rate
from moba_train.parallel.engine import backward, build_engine, set_accumulation, step_engine
from moba_train.runtime import finish, start

MICRO_BATCHES = (2, 2, 3)  # of each step: accumulation changes on the way
LIMIT = 0.05  # of the gradient norm: below every step's


class SquaredSum(nn.Module):
    """Its output is the loss, scaled, as ``TokenLosses`` has it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, inputs: torch.Tensor, scale: float) -> torch.Tensor:
        return self.layers(inputs).square().sum() * scale


def model() -> nn.Module:
    torch.manual_seed(3)
    return SquaredSum()


def micro_batch(step: int, index: int) -> torch.Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(10 * step + index))


def plain() -> dict:
    """The same steps in plain torch, whole batches at once."""
    module = model()
    optimizer = build_optimizer(module, OptimizerConfig(), fused=False)
    set_learning_rate(optimizer, 0.01)
    norms = []
    for step, count in enumerate(MICRO_BATCHES):
        losses = [module(micro_batch(step, index), 1 / count) for index in range(count)]
        torch.stack(losses).sum().backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), LIMIT)))
        optimizer.step()
        optimizer.zero_grad()
    weights = flat(module)
    module(micro_batch(9, 1), 1.0).backward()
    norm = float(nn.utils.clip_grad_norm_(module.parameters(), LIMIT))
    optimizer.step()
    return {"norms": norms, "weights": weights, "after": {"norm": norm, "weights": flat(module)}}


def flat(module: nn.Module) -> list[float]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return torch.cat([parameter.detach().float().flatten() for parameter in module.parameters()]).tolist()


def base_state(engine) -> list[torch.Tensor]:
    """This rank's share of the moments, and its counts of steps."""
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return [value.clone() for state in base.state.values() for value in state.values()]


def engines_own(train: TrainConfig) -> dict:
    runtime = start(LaunchConfig(device=Device.cpu, threads=1))
    module = model()
    dtype = torch.bfloat16 if train.precision is Precision.bf16 else torch.float32
    module.to(dtype)
    optimizer = build_optimizer(module, OptimizerConfig(), fused=train.offload.optimizer is not OffloadDevice.none)
    engine = build_engine(module, optimizer, train, runtime)
    set_learning_rate(engine.optimizer, 0.01)
    norms: list[float] = []
    for step, count in enumerate(MICRO_BATCHES):
        set_accumulation(engine, count)
        for index in range(count):
            backward(engine, engine(micro_batch(step, index).to(dtype), 1 / count))
            norm = step_engine(engine, train)
            assert (index == count - 1) == (norm == norm), "only a step's last micro-batch has a norm"
        norms.append(norm)
    facts = {"norms": norms, "weights": flat(engine.module), "training": engine.module.training}

    # A step whose first pass has an infinite loss, then one like any other.
    set_accumulation(engine, 2)
    moments = base_state(engine)
    for index, scale in enumerate((math.inf, 1.0)):
        backward(engine, engine(micro_batch(9, index).to(dtype), scale))
        norm = step_engine(engine, train)
    facts["skipped"] = {
        "finite": math.isfinite(norm),
        "weights": flat(engine.module),
        "moments": len(moments) > 2 and all(map(torch.equal, moments, base_state(engine))),
    }
    set_accumulation(engine, 1)
    backward(engine, engine(micro_batch(9, 1).to(dtype), 1.0))
    facts["after"] = {"norm": step_engine(engine, train), "weights": flat(engine.module)}
    finish()
    return facts


if __name__ == "__main__":
    stage, precision, optimizer, parameters = sys.argv[1:]
    given = TrainConfig(zero_stage=int(stage), precision=Precision[precision], gradient_clipping=LIMIT)
    given.offload = OffloadConfig(optimizer=OffloadDevice[optimizer], parameters=OffloadDevice[parameters])
    print(json.dumps({"engine": engines_own(given), "plain": plain()}))
