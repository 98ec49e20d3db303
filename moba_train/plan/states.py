"""Parameters, gradients and optimizer state of one rank under DeepSpeed's ZeRO, in bytes.

Read off DeepSpeed 0.19.8. bf16 parameters; fp32 sums of gradients, fp32 parameters and two AdamW moments.
"""

from __future__ import annotations

from moba_train.plan.activations import HALF, SINGLE
from moba_train.plan.setup import Setup

# DeepSpeed's defaults, in numbers.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
PREFETCH_BUCKET = 50_000_000


def states(setup: Setup) -> dict[str, float]:
    """What stays from step to step, by name."""
    count, stage, world = setup.shape.parameters, setup.train.zero_stage, setup.world_size
    parts: dict[str, float] = {"parameters": HALF * count / (world if stage == 3 else 1)}
    if stage == 1:
        # BF16_Optimizer: fp32 sums are not partitioned, and each parameter's bf16 gradient stays beside them.
        parts["gradients"] = (SINGLE + HALF) * count
    else:
        parts["gradients"] = SINGLE * count / world
    parts["optimizer"] = 3 * SINGLE * count / world
    return parts


def buffers(setup: Setup) -> dict[str, float]:
    """What exists during the forward and backward pass beside the states."""
    parts: dict[str, float] = {}
    if setup.train.zero_stage >= 2:
        parts["reduction bucket"] = HALF * REDUCE_BUCKET
    if setup.train.zero_stage == 3:
        parts["gathered parameters"] = HALF * min(setup.shape.parameters, LIVE_PARAMETERS + PREFETCH_BUCKET)
    return parts


def update(setup: Setup) -> dict[str, float]:
    """Temporaries of the optimizer's step: torch's AdamW over lists makes one tensor as large as a moment."""
    return {"update": SINGLE * setup.shape.parameters / setup.world_size}
