"""Seconds of what is kept outside the GPU: copies over its link to the host, the update in host memory, the disk."""

from __future__ import annotations

from moba_train.config import OffloadDevice
from moba_train.host_moments import MOMENTS
from moba_train.plan.activations import hidden_state
from moba_train.plan.hardware import GB_S, Hardware
from moba_train.plan.setup import HALF, SINGLE, Setup


def hidden_state_seconds(setup: Setup, hardware: Hardware) -> float:
    """Of one micro-batch: layers' inputs out and in."""
    if not setup.train.offload.hidden_states:
        return 0.0
    return 2 * setup.tokens * setup.shape.layers * hidden_state(setup) / (hardware.host_gbs * GB_S)


def parameter_seconds(setup: Setup, hardware: Hardware) -> float:
    """Of one micro-batch: parameters in for both passes, and the updated ones out."""
    share = HALF * setup.shape.parameters / setup.world_size
    device = setup.train.offload.parameters
    if device is OffloadDevice.none:
        return 0.0
    read = 2 * share / _disk(setup, hardware) if device is OffloadDevice.nvme else 0.0
    return read + 3 * share / (hardware.pageable_gbs * GB_S)


def step_seconds(setup: Setup, hardware: Hardware) -> float:
    """Of a step, with nothing beside it: moments in while others go out; or gradients out, AdamW on the CPU, parameters
    in."""
    device = setup.train.offload.optimizer
    share = setup.shape.parameters / setup.world_size
    if setup.train.offload.moments:
        return len(MOMENTS) * SINGLE * share / (hardware.host_gbs * GB_S)
    if device is OffloadDevice.none:
        return 0.0
    seconds = (SINGLE + HALF) * share / (hardware.host_gbs * GB_S)
    # All of a node's ranks update at once. Read: gradient, parameter, moments; written: all but the gradient.
    seconds += 7 * SINGLE * share * setup.gpus_per_node / (hardware.host_update_gbs * GB_S)
    if device is OffloadDevice.nvme:
        seconds += 2 * 3 * SINGLE * share / _disk(setup, hardware)
    return seconds


def _disk(setup: Setup, hardware: Hardware) -> float:
    """Bytes a second of a node's disk for each of its ranks."""
    return hardware.nvme_gbs * GB_S / setup.gpus_per_node
