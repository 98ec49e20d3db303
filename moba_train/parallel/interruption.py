"""A polite end: told by a signal, a run finishes its step, saves, and ends; ``run.resume=auto`` goes on from there.

Schedulers send SIGTERM, SIGUSR1 or SIGUSR2 before a time limit or a preemption, to some ranks or to all, once or again.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(Exception):
    """The run was told to stop, and its state is saved."""

    def __init__(self, number: int, step: int) -> None:
        self.exit_code = 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}: run.resume=auto goes on from there")


class Interruption:
    """Notes the first signal to this rank; the ranks agree at a step's end, since all must save the same step."""

    def __init__(self) -> None:
        self.number = 0
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame) -> None:
        self.number = self.number or number


@contextmanager
def ctrl_c() -> Iterator[None]:
    """Ctrl-C stays a KeyboardInterrupt where a library, cleaning up after it, fails with an error of its own, as
    OmegaConf does."""
    try:
        yield
    except Exception as error:
        earlier: BaseException | None = error
        while earlier is not None:
            if isinstance(earlier, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            earlier = earlier.__context__
        raise
