"""Where the time of a step goes, by the names of its kernels; used by bench_train.py."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from moba_train.bench.steps import KERNELS

# In this order: the first group with a name that occurs in the kernel's takes it.
GROUPS = {
    "attention": ("sdpa", "flash_fwd", "flash_bwd", "fmha", *(name for names in KERNELS.values() for name in names)),
    "matmul": ("gemm", "nvjet", "cutlass", "cublas", "xmma"),
    "loss": ("cross_entropy",),
    "optimizer": ("FusedAdam", "fused_adam", "adam", "LpNorm", "multi_tensor"),
    "communication": ("nccl",),
    "copies to and from the host": ("Memcpy HtoD", "Memcpy DtoH"),
    "norms, rotation, SwiGLU": ("rms_norm", "_triton_rope", "swiglu"),
    "elementwise and copies": ("",),
}
LONGEST = 8  # kernels of the last group that are named


def breakdown(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of one step by group, of the device's idle time, and of the longest kernels of no other group."""
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        began = time.perf_counter()
        step()
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    found = dict.fromkeys(GROUPS, 0.0)
    rest: dict[str, float] = {}
    for event in trace.key_averages():
        group = next(group for group, names in GROUPS.items() if any(name in event.key for name in names))
        found[group] += event.self_device_time_total / 1e6
        if group == "elementwise and copies":
            name = event.key[:24] + " … " + event.key[-44:] if len(event.key) > 70 else event.key
            rest[name] = rest.get(name, 0.0) + event.self_device_time_total / 1e6
    # Copies run beside kernels on a stream of their own.
    found["idle"] = max(0.0, seconds - sum(v for k, v in found.items() if k != "copies to and from the host"))
    found["step under the profiler"] = seconds
    longest = sorted(rest.items(), key=lambda item: -item[1])[:LONGEST]
    return {**found, **{f"  {name}": value for name, value in longest}}
