"""A trace of a few steps for chrome://tracing or Perfetto: ``train.profile_steps=[10,12]``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from moba_train.runtime import Runtime, log


class StepProfiler:
    """Traces the steps ``first`` to ``last`` of rank 0, and of the rank that was slowest before them.

    Args:
        steps: (first, last), both traced, counted from 1; empty: none
        folder: the run directory; traces go to its ``profile/``
    """

    def __init__(self, steps: list[int], folder: Path, runtime: Runtime) -> None:
        self._steps, self._folder, self._runtime = steps, folder / "profile", runtime
        self._profile: profile | None = None

    def before(self, step: int, slowest: int) -> None:
        """Begin to trace, if ``step``, which comes next, is the first to be traced.

        Args:
            step: counted from 1
            slowest: the rank that was slowest in the step before
        """
        if self._steps and step == self._steps[0] and self._runtime.rank in (0, slowest):
            activities = [ProfilerActivity.CPU]
            if self._runtime.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def after(self, step: int) -> None:
        """Write the trace, if ``step`` was the last to be traced."""
        if self._profile is None or step != self._steps[1]:
            return
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize(self._runtime.device)
        self._profile.stop()
        self._folder.mkdir(exist_ok=True)
        file = self._folder / f"steps_{self._steps[0]}-{step}_rank_{self._runtime.rank:05d}.json.gz"
        self._profile.export_chrome_trace(str(file))
        self._profile = None
        log.warning("trace of steps %d-%d of rank %d: %s", *self._steps, self._runtime.rank, file)
