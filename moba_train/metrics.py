"""What a step is judged by: loss by position, trailing loss, tokens a second, memory, utilisation.

``PositionLoss`` keeps one sum and one count for each bin of positions. Everything it reports is a quotient of
sums, so it is exact however the tokens were packed, padded, accumulated over micro-batches or spread over ranks.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from moba_train.cost import StepCost, device_peak_flops


class PositionLoss:
    """Sums and counts of next-token losses by the position of their target in its segment.

    Bins start at 0, ``bin_size``, 2 ``bin_size`` …; the last one is shorter where ``bin_size`` does not divide
    ``context_length``. The trailing loss is kept apart from the bins: it is over the last ``bin_size`` positions of
    the context, always that many, and only in segments that fill the context, so that each of its tokens had the
    whole context before it (MoBA, section 3.1: "trailing loss").

    Args:
        context_length: tokens of a row, the longest a segment can be
        bin_size: positions a bin holds
        device: where the losses are; adding waits for nothing on it

    Raises:
        ValueError: a size below 1
    """

    def __init__(self, context_length: int, bin_size: int, device: torch.device | str = "cpu") -> None:
        for name, value in (("context_length", context_length), ("bin_size", bin_size)):
            if value < 1:
                raise ValueError(f"{name}={value}: a position bin needs at least 1 token")
        self.context_length = context_length
        self.bin_size = bin_size
        self.bins = math.ceil(context_length / bin_size)
        # Row 0: sums, row 1: counts; the last column is the trailing loss. One tensor, so one all_reduce; float64
        # counts exactly up to 2**53 tokens and does not lose a small loss beside a large sum.
        self._state = torch.zeros(2, self.bins + 1, dtype=torch.float64, device=device)

    def add(self, losses: Tensor, positions: Tensor, valid: Tensor, fills: Tensor) -> None:
        """Count one micro-batch. All are (T,) on the device, one entry a predicted token.

        Args:
            losses: next-token loss in nats, fp32; what stands where ``valid`` is false is ignored, NaN too
            positions: the target's position in its segment, integer, in [0, context_length) where valid
            valid: bool; false at padding and where the next token belongs to another segment
            fills: bool; the token's segment fills the whole context
        """
        losses = torch.where(valid, losses.detach(), 0).to(torch.float64)
        positions = torch.where(valid, positions, 0)
        bins = (positions // self.bin_size).to(torch.int64)
        trailing = valid & fills & (positions >= self.context_length - self.bin_size)
        self._state[0, : self.bins].scatter_add_(0, bins, losses)
        self._state[1, : self.bins].scatter_add_(0, bins, valid.to(torch.float64))
        self._state[0, self.bins] += torch.where(trailing, losses, 0).sum()
        self._state[1, self.bins] += trailing.sum()

    def all_reduce(self) -> None:
        """Add up over all ranks, in one call; nothing to do in a single process."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._state)

    def reset(self) -> None:
        """Start anew, for the next step."""
        self._state.zero_()

    def as_row(self, prefix: str, curve: bool) -> dict[str, float]:
        """Mean losses in nats a token, as log keys: the one place that waits for the device.

        ``<prefix>/loss``, ``<prefix>/trailing_loss`` and, with ``curve``, ``<prefix>/position_loss/<bin start>`` (at
        least six digits). What no token was counted for is left out.
        """
        sums, counts = self._state.tolist()
        row = {}
        if total := sum(counts[: self.bins]):
            row[f"{prefix}/loss"] = sum(sums[: self.bins]) / total
        if counts[self.bins]:
            row[f"{prefix}/trailing_loss"] = sums[self.bins] / counts[self.bins]
        if curve:
            for i in range(self.bins):
                if counts[i]:
                    row[f"{prefix}/position_loss/{i * self.bin_size:06d}"] = sums[i] / counts[i]
        return row


class Throughput:
    """Tokens a second and utilisation over the last steps, and the time a run still needs.

    The clock runs from one ``step`` to the next and stands still inside ``pause`` (evaluation, checkpoints). On an
    accelerator the host must have waited for the step's result (reading its loss does) before ``step`` is called.

    Args:
        peak_flops: of all devices together, FLOP/s; None leaves utilisation out
        window: steps the rates are taken over
        clock: seconds, monotonic
    """

    def __init__(
        self, peak_flops: float | None = None, window: int = 20, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.peak_flops = peak_flops
        self.tokens = 0  # since this object was made
        self.seconds = 0.0  # spent in steps, pauses left out
        self._steps: deque[tuple[float, int, StepCost]] = deque(maxlen=window)
        self._clock = clock
        self._since = clock()

    def step(self, tokens: int, cost: StepCost | None = None) -> None:
        """A step over ``tokens`` tokens (all ranks together) has just ended."""
        now = self._clock()
        seconds = now - self._since
        self._since = now
        self.tokens += tokens
        self.seconds += seconds
        self._steps.append((seconds, tokens, cost or StepCost(0.0, 0.0)))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside counts for no step."""
        start = self._clock()
        try:
            yield
        finally:
            self._since += self._clock() - start

    def restart(self) -> None:
        """Forget the steps the rates are taken over and the time since the last: a stage of another speed begins."""
        self._steps.clear()
        self._since = self._clock()

    @property
    def tokens_per_second(self) -> float:
        """Over the last steps, all ranks together; 0.0 before the first."""
        seconds = sum(entry[0] for entry in self._steps)
        return sum(entry[1] for entry in self._steps) / seconds if seconds else 0.0

    def eta_seconds(self, tokens_left: int) -> float | None:
        """Seconds of training left at the present rate; None before the first step."""
        rate = self.tokens_per_second
        return tokens_left / rate if rate else None

    def as_row(self) -> dict[str, float]:
        """``perf/tokens_per_second`` and, where the peak and the steps' costs are known, both utilisations."""
        row = {"perf/tokens_per_second": self.tokens_per_second}
        seconds = sum(entry[0] for entry in self._steps)
        if self.peak_flops and seconds:
            for kind in ("model", "hardware"):
                flops = sum(getattr(cost, f"{kind}_flops") for _, _, cost in self._steps)
                if flops:
                    row[f"perf/{kind}_flop_utilization"] = flops / seconds / self.peak_flops
        return row


def memory_gb(device: torch.device | str) -> float:
    """Peak memory in GB (1e9 bytes): the allocator's on CUDA, this process's resident set elsewhere."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float:
    """One device's peak in FLOP/s: the vendor's dense bf16 figure where it applies, else the best matmul measured.

    Vendors' fp32 figures do not say what a matmul reaches, and CPUs have none, so those are measured (0.3 s); on a CPU
    with one thread, times the threads: beside another process all of them together would reach half of that.
    """
    device = torch.device(device)
    if device.type == "cuda" and dtype == torch.bfloat16:
        known = device_peak_flops(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    if device.type == "cuda":
        return _measured_matmul_flops(device, dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return threads * _measured_matmul_flops(device, dtype)
    finally:
        torch.set_num_threads(threads)


def _measured_matmul_flops(device: torch.device, dtype: torch.dtype, budget_seconds: float = 0.3) -> float:
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, start = math.inf, time.perf_counter()
    while best is math.inf or time.perf_counter() - start < budget_seconds:
        tick = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - tick)
    return 2 * size**3 / best
