"""Times, memory and the rates of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

SECONDS = {"cpu": 2.0, "cuda": 1.0}  # of calls to take the median of, at most
MOST_CALLS = {"cpu": 9, "cuda": 50}
Call = Callable[[], object]


def milliseconds(call: Call, device: torch.device, warm: int = 2) -> float:
    """Median over calls that follow each other without a pause, as the layers of a model do."""
    for _ in range(warm):
        call()
    marks = _cuda_marks if device.type == "cuda" else _cpu_marks
    (first,) = marks(call, 1)
    more = min(MOST_CALLS[device.type], int(SECONDS[device.type] * 1e3 / first))
    return statistics.median(marks(call, more)) if more > 1 else first


def _cuda_marks(call: Call, calls: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def _cpu_marks(call: Call, calls: int) -> list[float]:
    marks = [time.perf_counter()]
    for _ in range(calls):
        call()
        marks.append(time.perf_counter())
    return [1e3 * (after - before) for before, after in pairwise(marks)]


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at best, measured: of a large bf16 matrix product, and of a large copy."""

    flops_per_ms: float
    bytes_per_ms: float


def ceilings(device: torch.device) -> Ceilings:
    """Measure them. CUDA only."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(1 << 30, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    product = milliseconds(lambda: a @ b, device)
    copy = milliseconds(lambda: target.copy_(source), device)
    return Ceilings(2 * 8192**3 / product, 2 * source.nbytes / copy)


def extra_memory(call: Call, tensors: list[Tensor]) -> float:
    """Peak memory of a forward and backward call beyond query, key, value, out and their gradients, as a share of
    those. CUDA only.

    Args:
        tensors: query, key, value and the output's gradient, which are there already: half of it.
    """
    half = sum(tensor.nbytes for tensor in tensors)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before - half) / (2 * half)


def kernel_times(call: Call) -> dict[str, float]:
    """Milliseconds by kernel name, of one call. CUDA only."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        call()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / 1e3 for event in trace.key_averages()}
