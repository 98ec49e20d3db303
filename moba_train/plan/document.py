"""A prediction as plain values, for JSON."""

from __future__ import annotations

from typing import Any

from moba_train.plan.advice import Switch
from moba_train.plan.estimate import Estimate, StageEstimate
from moba_train.plan.memory import GB


def as_dict(found: Estimate, offered: list[Switch], chosen: list[Switch]) -> dict[str, Any]:
    """Memory in bytes, time in seconds; ``fits`` is None where the GPU has room and the host's memory is not known."""
    return {
        "gpu": found.hardware.gpu,
        "gpu_memory_bytes": found.hardware.memory_gb * GB,
        "gpus": found.world_size,
        "host_bytes": found.host,
        "fits": _fits(found),
        "seconds": found.seconds,
        "gpu_hours": found.gpu_hours,
        "stages": [_stage(stage) for stage in found.stages],
        "switches": [_switch(switch) for switch in offered],
        "to_fit": [_switch(switch) for switch in chosen],
    }


def _fits(found: Estimate) -> bool | None:
    return found.fits if found.host_is_known or not found.fits else None


def _stage(stage: StageEstimate) -> dict[str, Any]:
    return {
        "name": stage.setup.stage.name,
        "context_length": stage.setup.stage.context_length,
        "steps": stage.setup.stage.steps,
        "micro_batches": stage.setup.micro_batches,
        "memory_bytes": {
            "needed": stage.memory.needed,
            "peak": stage.memory.peak,
            "peak_moment": stage.memory.peak_moment,
            "moments": stage.memory.moments,
        },
        "step_seconds": {"total": stage.time.total, **stage.time.parts},
        "tokens_per_second": stage.tokens_per_second,
        "model_flops": stage.cost.model_flops,
    }


def _switch(switch: Switch) -> dict[str, Any]:
    return {
        "settings": switch.text,
        "saved_bytes": switch.saved,
        "needed_bytes": switch.estimate.needed,
        "slowdown": switch.slowdown,
        "host_bytes": switch.estimate.host,
        "fits": _fits(switch.estimate),
    }
