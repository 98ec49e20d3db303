"""Steps without an update: the loss or the gradient was not finite somewhere, and all ranks left parameters alone."""

from __future__ import annotations

import math

from moba_train.runtime import log


class SkippedSteps:
    """Counts them; alike on all ranks, since the gradient norm is.

    Args:
        limit: so many in a row end the run (``train.nonfinite_limit``)
        total, in_a_row: counted before this process began
    """

    def __init__(self, limit: int, total: int = 0, in_a_row: int = 0) -> None:
        self.total = total
        self._limit = limit
        self.in_a_row = in_a_row

    def note(self, step: int, loss: float, gradient_norm: float) -> None:
        """Step number ``step`` is done.

        Raises:
            FloatingPointError: it was the last of ``limit`` in a row.
        """
        if math.isfinite(gradient_norm):
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        what = f"step {step} was skipped: its loss is {loss:.4g} and its gradient norm {gradient_norm:.4g}"
        if self.in_a_row >= self._limit:
            raise FloatingPointError(
                f"{what}, as {self.in_a_row} in a row (train.nonfinite_limit={self._limit}): lower "
                f"schedule.learning_rate.peak, or look at the data of this step; run.resume=auto goes on from the last "
                f"checkpoint"
            )
        log.info("%s", what)  # by rank 0
