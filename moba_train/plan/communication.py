"""Bytes that ZeRO and Ulysses move between GPUs, and the seconds they take over given bandwidths.

Collectives over all ranks use every link at once: of what a rank gathers, the share of other nodes comes in through the
network of all GPUs of its node together, and all of it over NVLink.
"""

from __future__ import annotations

from moba_train.plan.hardware import GB_S, Hardware
from moba_train.plan.setup import HALF, Setup

# Sends and receives between pairs of GPUs, of what collectives reach: 208 GB/s each way between two H200s.
_PAIRS_SHARE = 0.58


def collective_seconds(setup: Setup, hardware: Hardware, size: float) -> float:
    """To gather, or to reduce and scatter, ``size`` bytes that are spread over all ranks."""
    world, nodes = setup.world_size, setup.nodes
    within = size * (world - 1) / world / hardware.nvlink_gbs
    between = size * (nodes - 1) / nodes / (setup.gpus_per_node * hardware.network_gbs)
    return max(within, between) / GB_S


def exchange_seconds(setup: Setup, hardware: Hardware) -> float:
    """Ulysses's in one pass through one layer: each rank exchanges equal parts with its group's ranks."""
    group = setup.sequence_parallel_size
    if group == 1:
        return 0.0
    size = ulysses_bytes(setup)
    near = min(group, setup.gpus_per_node)
    within = size * (near - 1) / group / (_PAIRS_SHARE * hardware.nvlink_gbs)
    between = size * (group - near) / group / hardware.network_gbs
    # Each rank's parcel is copied together before and apart after: read and written once.
    return (max(within, between) + 2 * size / hardware.hbm_gbs) / GB_S


def ulysses_bytes(setup: Setup) -> float:
    """Of one rank and one pass over one layer: queries, keys, values and the output."""
    return HALF * setup.tokens * 2 * (setup.query_size + setup.key_size)


def pass_bytes(setup: Setup) -> float:
    """ZeRO's, of one micro-batch: stage 3 gathers parameters in both passes; 2 and 3 reduce gradients."""
    size = HALF * setup.shape.parameters
    return size * {0: 0, 1: 0, 2: 1, 3: 3}[setup.train.zero_stage]


def step_bytes(setup: Setup) -> float:
    """ZeRO's, once a step: an all-reduce of gradients is two collectives, and updated parameters are gathered."""
    size = HALF * setup.shape.parameters
    return size * {0: 2, 1: 3, 2: 1, 3: 0}[setup.train.zero_stage]
