"""What each rank does at a step, seen from all: its time, its memory, whether it was told to stop, and who is slow.

Ranks wait for one another in every reduction, so the time of a step is the same on all of them and names nobody. A
rank's own time is that of its batches and its forward passes, which reduce nothing under ZeRO 0–2; under ZeRO 3 and
sequence parallelism they gather from other ranks, and a slow one shows less, in its batches and launches alone.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moba_train.runtime import Runtime, log

SLOW = 1.2  # times the median of the other ranks
PERSISTENT_STEPS = 10  # in a row, before a word is said
REMIND_STEPS = 500  # a rank that stays slow is named again after as many


class OwnTime:
    """Seconds that this rank spends on its own account in a step; on a GPU the kernels' time, without a wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._host = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """What is done inside is this rank's own, and ends on the host."""
        began = time.perf_counter()
        yield
        self._host += time.perf_counter() - began

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """What is queued inside is this rank's own; on a GPU the time from its first kernel to its last."""
        if not self._cuda:
            with self.on_host():
                yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((begin, end))

    def take(self) -> float:
        """Seconds since the last call; the device must have been waited for since."""
        seconds = self._host + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        self._host, self._events = 0.0, []
        return seconds


@dataclass(frozen=True)
class Peers:
    """One entry a rank."""

    seconds: list[float]  # own time of the step
    memory_gb: list[float]  # peak, of 1e9 bytes
    signals: list[float]  # the number of a signal that was received, else 0

    @property
    def signal(self) -> int:
        return int(max(self.signals))

    @property
    def slowest(self) -> int:
        return max(range(len(self.seconds)), key=self.seconds.__getitem__)

    def as_row(self) -> dict[str, float]:
        """``perf/rank_seconds_*`` and ``perf/rank_memory_gb_*`` (min, median, max) and ``perf/slowest_rank``."""
        if len(self.seconds) == 1:
            return {}
        row: dict[str, float] = {"perf/slowest_rank": self.slowest}
        for name, values in (("rank_seconds", self.seconds), ("rank_memory_gb", self.memory_gb)):
            for word, of in (("min", min), ("median", statistics.median), ("max", max)):
                row[f"perf/{name}_{word}"] = of(values)
        return row


def exchange(runtime: Runtime, seconds: float, memory_gb: float, signal: int) -> Peers:
    """Every rank's figures on every rank, in one collective."""
    table = torch.zeros(3, runtime.world_size, dtype=torch.float64, device=runtime.device)
    table[:, runtime.rank] = torch.tensor([seconds, memory_gb, signal], dtype=torch.float64)
    if runtime.world_size > 1:
        dist.all_reduce(table)
    return Peers(*table.tolist())


class Stragglers:
    """Names a rank that is slower than the others for many steps in a row."""

    def __init__(self, runtime: Runtime) -> None:
        self._hosts: list[str] = [socket.gethostname()] * runtime.world_size
        if runtime.world_size > 1:
            dist.all_gather_object(self._hosts, socket.gethostname())
        self._slow_steps = [0] * runtime.world_size

    def note(self, peers: Peers) -> None:
        """Warn on rank 0's behalf: call it there alone."""
        for rank, seconds in enumerate(peers.seconds):
            others = peers.seconds[:rank] + peers.seconds[rank + 1 :]
            usual = statistics.median(others) if others else seconds
            self._slow_steps[rank] = self._slow_steps[rank] + 1 if seconds > SLOW * usual else 0
            if self._slow_steps[rank] % REMIND_STEPS == PERSISTENT_STEPS:
                log.warning(
                    "rank %d on %s has been slower than the others for %d steps: %.3g s a step on its own account, "
                    "theirs is %.3g s",
                    *(rank, self._hosts[rank], self._slow_steps[rank], seconds, usual),
                )
