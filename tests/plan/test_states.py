"""Parameters, gradients and optimizer state: against DeepSpeed's engine on a CPU, and by hand over several ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moba_train.config import OffloadDevice, Precision
from moba_train.plan import states
from plan.cases import LLAMA_1B, WIDE, recipe, setup_of
from tiny import run_ranks

SCRIPT = Path(__file__).parent / "engine_states.py"


def counted(*arguments: str) -> dict[str, int]:
    return json.loads(run_ranks(SCRIPT, list(arguments)).splitlines()[-1])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "offload", "gradients"),
    [
        (1, "none", "fp32"),
        (1, "none", "bf16"),
        (1, "cpu", "fp32"),
        (2, "none", "fp32"),
        (2, "cpu", "fp32"),
        (3, "none", "fp32"),
        (3, "moments", "bf16"),
    ],
)
def test_states_are_those_of_the_engine(stage: int, offload: str, gradients: str) -> None:
    config = recipe(WIDE, 64, zero_stage=stage, gradient_dtype=Precision[gradients])
    config.train.offload.moments = offload == "moments"
    config.train.offload.optimizer = OffloadDevice.none if offload == "moments" else OffloadDevice[offload]
    setup = setup_of(config)
    everything = setup.shape.parameters
    parts = states.resting(setup) | states.gradients(setup, everything)
    found = counted(str(stage), offload, gradients)
    assert sum(parts.values()) + states.on_host(setup) == pytest.approx(found["after"], rel=0.01)
    if (stage, gradients) in ((1, "fp32"), (3, "fp32")):  # their peak on so small a model
        reduction = states.reduction(setup) | states.bucket(setup) | states.gathered(setup)
        assert found["after"] + sum(reduction.values()) == pytest.approx(found["peak"], rel=0.01)


def test_shares_of_several_ranks_by_hand() -> None:
    config = recipe(LLAMA_1B, 32768, tokens_per_step=32768 * 4)
    config.launch.processes = 4

    def shares(stage: int) -> dict[str, float]:
        config.train.zero_stage = stage
        setup = setup_of(config)
        parts = states.resting(setup) | states.gradients(setup, setup.shape.parameters)
        return {name: size / setup.shape.parameters for name, size in parts.items() if "bucket" not in name}

    assert shares(1) == {"parameters": 2, "gradients": 6, "optimizer": 3}
    assert shares(2) == {"parameters": 2, "gradients": 1, "optimizer": 3}
    assert shares(3) == {"parameters": 0.5, "gradients": 1, "optimizer": 3}
