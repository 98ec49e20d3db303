"""Parameters, gradients and optimizer state of one rank under DeepSpeed's ZeRO, in bytes.

Read off DeepSpeed 0.19.8, and counted on it by tests/plan/test_states.py. The optimizer has fp32 parameters and two
moments beside the bf16 parameters.
"""

from __future__ import annotations

from moba_train.config import OffloadDevice, Precision
from moba_train.host_moments import MOMENTS, PIECE, ROOMS
from moba_train.plan.setup import HALF, SINGLE, Setup

Parts = dict[str, float]

# DeepSpeed's defaults, in numbers.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
PREFETCH_BUCKET = 50_000_000
SUB_GROUP = 1_000_000_000
SWAP_BUFFERS = 4 + 1  # of a sub-group each, between the disk and the update, and the gradients'
_DOUBLE = 8


def resting(setup: Setup) -> Parts:
    """What stays from step to step."""
    count, stage, world = setup.shape.parameters, setup.train.zero_stage, setup.world_size
    parts: Parts = {}
    if stage < 3:
        parts["parameters"] = HALF * count
    else:
        # Each rank's share, and what is gathered at a time.
        own = 0.0 if setup.train.offload.parameters is not OffloadDevice.none else HALF * count / world
        parts["parameters"] = own
        parts["reduction bucket"] = HALF * REDUCE_BUCKET
    if not _optimizer_is_elsewhere(setup):
        parts["optimizer"] = (1 if setup.train.offload.moments else 3) * SINGLE * count / world
    elif stage < 3:  # where gradients pass through on their way to the host
        parts["transfer"] = HALF * largest(setup)
    return parts


def gradients(setup: Setup, made: float) -> Parts:
    """Of parameters, during the backward pass.

    Args:
        made: numbers of parameters whose gradient is there. A step's second micro-batch finds all of the first's.
    """
    count, world = setup.shape.parameters, setup.world_size
    present = count if setup.micro_batches > 1 else made
    stage = setup.train.zero_stage
    if stage == 3:
        return {} if _optimizer_is_elsewhere(setup) else {"gradients": _sums(setup) * count / world}
    if stage == 2:
        return {"gradients": _sums(setup) * count / world}
    if _summed_by_zero(setup):
        return {"gradients": _sums(setup) * present}
    # BF16_Optimizer: fp32 sums are not partitioned, and each parameter's bf16 gradient stays beside them.
    return {"gradients": SINGLE * count + HALF * present}


def bucket(setup: Setup) -> Parts:
    """Where gradients are collected to be sent, from the first of a backward pass to the last. Stage 3 keeps it."""
    if setup.train.zero_stage == 2 or (setup.train.zero_stage == 1 and _summed_by_zero(setup)):
        return {"reduction bucket": _sent(setup) * REDUCE_BUCKET}
    return {}


def reduction(setup: Setup) -> Parts:
    """Copies while ranks add up gradients, at the end of the backward pass."""
    some = min(setup.shape.parameters, REDUCE_BUCKET)
    if setup.train.zero_stage == 3:
        return {"reduction": SINGLE * some}
    if setup.train.zero_stage == 2:
        return {}
    if _optimizer_is_elsewhere(setup):  # a bucket made flat, and the gradients of other buckets on their way out
        return {"reduction": _sums(setup) * setup.shape.parameters / setup.world_size}
    if _summed_by_zero(setup):
        return {}
    # Flattened as they are, and in the type that is sent, if that is another.
    return {"reduction": (SINGLE + HALF * (_sent(setup) == HALF)) * some}


def _sums(setup: Setup) -> int:
    """Bytes of a gradient's number where several are added up."""
    return SINGLE if setup.train.gradient_dtype is Precision.fp32 else HALF


def _sent(setup: Setup) -> int:
    """Bytes of a number that is sent. A single rank at stage 1 sends nothing, and rounds nothing for it."""
    if setup.train.reduction_dtype is not None:
        return SINGLE if setup.train.reduction_dtype is Precision.fp32 else HALF
    return _sums(setup) if setup.world_size == setup.train.zero_stage == 1 else HALF


def _summed_by_zero(setup: Setup) -> bool:
    """Whether gradients are added up by DeepSpeed's optimizer of stages 1 and 2, and not by its BF16_Optimizer."""
    return _optimizer_is_elsewhere(setup) or _sums(setup) == HALF


def gathered(setup: Setup) -> Parts:
    """Parameters of all ranks that stage 3 has at a time."""
    if setup.train.zero_stage < 3:
        return {}
    return {"gathered parameters": HALF * min(setup.shape.parameters, LIVE_PARAMETERS + PREFETCH_BUCKET)}


def update(setup: Setup) -> Parts:
    """Temporaries of the step: the norm in double precision, a parameter at a time; bf16 sums made flat, then fp32, a
    group of the optimizer's at a time, at stage 3 fp32 of a sub-group; and the moments that are not on the host."""
    parts: Parts = {}
    share, train = setup.shape.parameters / setup.world_size, setup.train
    if train.zero_stage >= 2:
        parts["norm"] = _DOUBLE * min(largest(setup), share)
    if train.gradient_dtype is Precision.bf16 and not _optimizer_is_elsewhere(setup):
        group = (HALF + SINGLE) * _largest_group(setup) / setup.world_size
        parts["gradients in fp32"] = SINGLE * min(share, SUB_GROUP) if train.zero_stage == 3 else group
    if train.offload.moments:
        parts["moments"] = len(MOMENTS) * SINGLE * min(share, ROOMS * PIECE)
    return parts


def on_host(setup: Setup) -> float:
    """Bytes of host memory for one rank's states; pinned copies of gradients and parameters among them."""
    share = setup.shape.parameters / setup.world_size
    offload = setup.train.offload
    total = 0.0
    if offload.optimizer is OffloadDevice.cpu:
        total += share * (20 if setup.train.zero_stage == 3 else 18)
        total += HALF * largest(setup) * (setup.train.zero_stage < 3)
    if offload.optimizer is OffloadDevice.nvme:
        # A sub-group's parameters, moments and gradients on their way, and the gradients that they are filled from.
        sums = SINGLE if setup.train.gradient_dtype is Precision.fp32 else HALF
        total += SWAP_BUFFERS * SINGLE * min(share, SUB_GROUP) + sums * share
    if offload.moments:
        total += len(MOMENTS) * SINGLE * share
    if offload.parameters is OffloadDevice.cpu:
        total += share * HALF
    return total


def largest(setup: Setup) -> int:
    """Numbers of the largest parameter: the embedding, as a rule."""
    return setup.shape.hidden_size * max(setup.shape.vocab_size, setup.shape.mlp_size)


def _largest_group(setup: Setup) -> int:
    """Numbers of the parameters that decay, matrices of layers, or of the others (``optimizer.parameter_groups``)."""
    decayed = setup.shape.layers * setup.shape.layer_matrix_parameters
    return max(decayed, setup.shape.parameters - decayed)


def _optimizer_is_elsewhere(setup: Setup) -> bool:
    return setup.train.offload.optimizer is not OffloadDevice.none
