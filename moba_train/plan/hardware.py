"""GPUs and the rates they reach. One of them was measured; the others follow from it and their data sheets.

Rates are what kernels reach, not what a data sheet promises. Those of the H200 are measurements of ours: attention as
in the README, matmul and what does little but read and write in whole steps of a 1B model.
Another GPU's arithmetic is the H200's times the ratio of their dense bf16 peaks, and its memory the H200's times the
ratio of their bandwidths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise


@dataclass
class PlanConfig:
    """What ``moba-train plan`` assumes beside the recipe. Unset: the figures of ``gpu``."""

    gpu: str = "H200"
    memory_gb: float | None = None  # of a GPU, 1e9 bytes
    host_memory_gb: float | None = None  # of a node; unset: what is offloaded is told and not checked
    matmul_tflops: float | None = None  # bf16, at the model's sizes
    full_forward_tflops: float | None = None  # full attention at head_dim 128, of the operations it needs
    full_backward_tflops: float | None = None
    moba_forward_tflops: dict[int, float] = field(default_factory=dict)  # by block_size, of the keys that are read
    moba_backward_tflops: dict[int, float] = field(default_factory=dict)
    gate_tflops: float | None = None  # scores of block means, and choosing
    hbm_gbs: float | None = None  # GB/s read and written by kernels that do little else
    nvlink_gbs: float | None = None  # GB/s a GPU sends to the others of its node
    network_gbs: float | None = None  # GB/s a GPU sends to other nodes
    host_gbs: float | None = None  # GB/s between a GPU and pinned host memory, one way
    pageable_gbs: float | None = None  # the same of memory that is not pinned
    host_update_gbs: float | None = None  # GB/s of the optimizer's update in host memory, a node
    nvme_gbs: float | None = None  # GB/s of a node's disk


@dataclass(frozen=True)
class Hardware:
    """A GPU and what surrounds it. Units as in ``PlanConfig``."""

    gpu: str
    memory_gb: float
    host_memory_gb: float | None
    matmul_tflops: float
    full_forward_tflops: float
    full_backward_tflops: float
    moba_forward_tflops: dict[int, float]
    moba_backward_tflops: dict[int, float]
    gate_tflops: float
    hbm_gbs: float
    nvlink_gbs: float
    network_gbs: float
    host_gbs: float
    pageable_gbs: float
    host_update_gbs: float
    nvme_gbs: float
    measured: bool  # or scaled by data sheet

    def moba_tflops(self, block_size: int, backward: bool) -> float:
        """Rate at a block size, linear in its logarithm between those that are known."""
        known = sorted((self.moba_backward_tflops if backward else self.moba_forward_tflops).items())
        if block_size <= known[0][0]:
            return known[0][1]
        for (low, low_rate), (high, high_rate) in pairwise(known):
            if block_size <= high:
                share = math.log(block_size / low) / math.log(high / low)
                return low_rate + share * (high_rate - low_rate)
        return known[-1][1]


GB_S = 1e9  # bytes a second of 1 GB/s

H200 = Hardware(
    gpu="H200",
    memory_gb=150.1,
    host_memory_gb=None,
    matmul_tflops=720,
    full_forward_tflops=530,
    full_backward_tflops=526,
    # Of the README's cases, the gate and the bytes of routed queries taken out.
    moba_forward_tflops={128: 620, 512: 610, 4096: 735},
    moba_backward_tflops={128: 485, 512: 403, 4096: 460},
    gate_tflops=260,
    hbm_gbs=3600,
    nvlink_gbs=360,
    network_gbs=40,
    host_gbs=50,
    pageable_gbs=1.5,  # of DeepSpeed's parameters in host memory
    host_update_gbs=100,
    nvme_gbs=6,
    measured=True,
)

# Data sheets: memory in GB as torch reports it, dense bf16 TFLOP/s, memory, NVLink, network and host GB/s one way.
_DATA_SHEETS = {
    "H200": (150.1, 989.4, 4800, 450, 50, 63),
    "H100": (85.0, 989.4, 3350, 450, 50, 63),
    "B200": (192.0, 2250, 8000, 900, 50, 63),
    "A100-80GB": (85.0, 312, 2039, 300, 25, 31),
    "A100-40GB": (42.4, 312, 1555, 300, 25, 31),
}


def hardware(settings: PlanConfig) -> Hardware:
    """The GPU that the settings name, with their own figures in place of its.

    Raises:
        ValueError: an unknown GPU, or a figure that is not above 0.
    """
    if settings.gpu not in _DATA_SHEETS:
        raise ValueError(
            f"plan.gpu={settings.gpu} is unknown: choose from {', '.join(_DATA_SHEETS)}, or take the nearest and give "
            f"plan.memory_gb and its rates"
        )
    own = {
        each.name: getattr(settings, each.name)
        for each in fields(settings)
        if each.name != "gpu" and getattr(settings, each.name) not in (None, {})
    }
    for name, value in own.items():
        for number in value.values() if isinstance(value, dict) else [value]:
            if not 0 < number < math.inf:
                raise ValueError(f"plan.{name}={value}: must be above 0")
    return replace(_scaled(settings.gpu), **own)


def _scaled(gpu: str) -> Hardware:
    memory, *rates = _DATA_SHEETS[gpu]
    flops, hbm, nvlink, network, host = (
        rate / reference for rate, reference in zip(rates, _DATA_SHEETS["H200"][1:], strict=True)
    )
    return replace(
        H200,
        gpu=gpu,
        memory_gb=memory,
        matmul_tflops=H200.matmul_tflops * flops,
        full_forward_tflops=H200.full_forward_tflops * flops,
        full_backward_tflops=H200.full_backward_tflops * flops,
        moba_forward_tflops={block: rate * flops for block, rate in H200.moba_forward_tflops.items()},
        moba_backward_tflops={block: rate * flops for block, rate in H200.moba_backward_tflops.items()},
        gate_tflops=H200.gate_tflops * flops,
        hbm_gbs=H200.hbm_gbs * hbm,
        nvlink_gbs=H200.nvlink_gbs * nvlink,
        network_gbs=H200.network_gbs * network,
        host_gbs=H200.host_gbs * host,
        measured=gpu == "H200",
    )
