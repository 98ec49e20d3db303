"""Two steps on DeepSpeed's engine, on a CPU; prints the bytes that live after a backward pass, and its peak.

python engine_states.py ZERO_STAGE OFFLOAD GRADIENT_DTYPE
"""

from __future__ import annotations

import json
import os
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

from moba_train import hf_attention
from moba_train.attention import AttentionSpec
from moba_train.config import (
    Device,
    LaunchConfig,
    ModelConfig,
    OffloadDevice,
    OptimizerConfig,
    Precision,
    TrainConfig,
)
from moba_train.loss import TokenLosses
from moba_train.model import load_model
from moba_train.optimizer import build_optimizer
from moba_train.parallel.engine import build_engine, set_accumulation, step_engine
from moba_train.runtime import start
from plan.cases import WIDE
from plan.live_bytes import LiveBytes


def main(stage: str, offload: str, gradient_dtype: str) -> None:
    runtime = start(LaunchConfig(device=Device.cpu))
    train = TrainConfig(precision=Precision.bf16, zero_stage=int(stage), gradient_dtype=Precision[gradient_dtype])
    train.offload.moments = offload == "moments"
    train.offload.optimizer = OffloadDevice.none if train.offload.moments else OffloadDevice[offload]
    with LiveBytes() as live:
        model = load_model(ModelConfig(architecture=WIDE), train.precision)
        hf_attention.set_plan(model, [AttentionSpec("full")] * model.config.num_hidden_layers)
        losses = TokenLosses(model, 64)
        engine = build_engine(
            losses, build_optimizer(losses, OptimizerConfig(), True, train.offload.moments), train, runtime
        )
        set_accumulation(engine, 1)
        ids = torch.zeros(1, 64, dtype=torch.int64)
        bounds = torch.tensor([0, 64], dtype=torch.int32)
        for _ in range(2):
            positions = torch.arange(64)[None]
            loss, _ = engine(ids, ids, 1.0, position_ids=positions, cu_seq_lens_q=bounds, max_length_q=64)
            live.peak = live.now()
            engine.backward(loss, scale_wrt_gas=False)
            counted = {"after": live.now(), "peak": live.peak}
            step_engine(engine, train)
    print(json.dumps(counted))


if __name__ == "__main__":
    main(*sys.argv[1:])
