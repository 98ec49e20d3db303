"""Seconds of what is kept outside the GPU: copies over its link to the host, the update in host memory, the disk."""

from __future__ import annotations

from moba_train.config import OffloadDevice
from moba_train.plan.activations import hidden_state
from moba_train.plan.hardware import GB_S, Hardware
from moba_train.plan.setup import HALF, SINGLE, Setup


def pass_seconds(setup: Setup, hardware: Hardware) -> float:
    """Of one micro-batch, beside its arithmetic: layers' inputs out and in, and parameters in for both passes."""
    offload = setup.train.offload
    moved = 0.0
    if offload.hidden_states:
        moved += 2 * setup.tokens * setup.shape.layers * hidden_state(setup)
    if offload.parameters is not OffloadDevice.none:
        moved += 2 * HALF * setup.shape.parameters / setup.world_size
    seconds = moved / (hardware.host_gbs * GB_S)
    if offload.parameters is OffloadDevice.nvme:
        seconds += 2 * HALF * setup.shape.parameters / setup.world_size / _disk(setup, hardware)
    return seconds


def step_seconds(setup: Setup, hardware: Hardware) -> float:
    """Of a step, with nothing beside it: gradients out, AdamW on the CPU, parameters in."""
    device = setup.train.offload.optimizer
    if device is OffloadDevice.none:
        return 0.0
    share = setup.shape.parameters / setup.world_size
    seconds = (SINGLE + HALF) * share / (hardware.host_gbs * GB_S)
    # All of a node's ranks update at once. Read: gradient, parameter, moments; written: all but the gradient.
    seconds += 7 * SINGLE * share * setup.gpus_per_node / (hardware.host_update_gbs * GB_S)
    if device is OffloadDevice.nvme:
        seconds += 2 * 3 * SINGLE * share / _disk(setup, hardware)
    return seconds


def _disk(setup: Setup, hardware: Hardware) -> float:
    """Bytes a second of a node's disk for each of its ranks."""
    return hardware.nvme_gbs * GB_S / setup.gpus_per_node
