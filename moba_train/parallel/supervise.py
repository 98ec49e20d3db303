"""Processes that were started together end together: with the first that fails, and with the one that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from moba_train.parallel import interruption, lifetime

_POLL_SECONDS = 0.05
_KILL_SECONDS = 5.0  # from SIGHUP to SIGKILL, once one has failed
_SAVED_SECONDS = 120.0  # for the others to end, once one has saved and ended because of a signal
SSH_FAILED = 255  # ssh's own exit code, where it could not connect or lost the connection
FORWARDED = (signal.SIGINT, *interruption.SIGNALS)
INTERRUPTED = tuple(128 + number for number in interruption.SIGNALS)  # the exit codes of a rank that saved on a signal


class Child(Protocol):
    """A started process, and how a signal reaches it."""

    name: str  # for messages

    def poll(self) -> int | None:
        """Its exit code, None while it runs; negative where a signal ended it."""

    def send(self, number: int) -> None:
        """Pass a signal on; SIGKILL leaves nothing of it running."""


class Process:
    """A process of this machine, in a session of its own, which ends with this one."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], handed: Sequence[int] = ()
    ) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, env=environment, pass_fds=handed, start_new_session=True, preexec_fn=lifetime.follow_parent
        )

    def poll(self) -> int | None:
        return self._process.poll()

    def send(self, number: int) -> None:
        if self._process.returncode is None:  # a number whose exit code was read may be another process's by now
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


def run(starts: Iterable[Callable[[], Child]]) -> int:
    """Start the processes and wait for their end; when one fails, end the others.

    What ``FORWARDED`` names is passed on, and waited out, so that nothing is left running; a SIGINT that this process
    ignores, as a background job of a shell does, they are left to ignore too. What this process did on a signal before,
    it does at the end: submitit queues a job again so, once its run has saved.

    Returns:
        0, or the exit code of the first process that failed; 128 + the signal's number where a signal ended it.
    """
    children: list[Child] = []
    received: list[int] = []

    def forward(number: int, _frame) -> None:
        received.append(number)
        _send(children, number)

    ignored = signal.SIGINT if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else None
    previous = {number: signal.signal(number, forward) for number in FORWARDED if number != ignored}
    try:
        for start in starts:
            children.append(start())
        if received:  # while they were being started
            _send(children, received[0])
        code = _wait(children)
    finally:
        _send(children, signal.SIGKILL)  # none is left, unless this process itself fails
        for number, handler in previous.items():
            signal.signal(number, handler)
    for each in dict.fromkeys(received):
        handler = previous[signal.Signals(each)]
        if callable(handler) and handler is not signal.default_int_handler:
            handler(each, None)
    return code if code >= 0 else 128 - code


def _wait(children: list[Child]) -> int:
    """The code of the first process to fail (the lowest rank's of several), once all have ended; 0 if none did."""
    first = 0
    kill_at = float("inf")
    while True:
        codes = [child.poll() for child in children]
        if not first and (first := next((code for code in codes if code), 0)):
            _tell(children[codes.index(first)].name, first)
            saved = first in INTERRUPTED  # the others are about to end for the same reason
            kill_at = time.monotonic() + (_SAVED_SECONDS if saved else _KILL_SECONDS)
            if not saved:  # SIGTERM asks for a checkpoint, and no collective will complete any more
                _send(children, signal.SIGHUP)
        if None not in codes:
            return first
        if time.monotonic() > kill_at:
            _send(children, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def _tell(name: str, code: int) -> None:
    """Where the process could not say why it ended."""
    if code < 0:
        reason = " (the machine's memory may not suffice)" if code == -signal.SIGKILL else ""
        print(f"{name} was ended by {signal.Signals(-code).name}{reason}", file=sys.stderr, flush=True)
    elif code == SSH_FAILED:
        print(f"{name}: the connection was lost", file=sys.stderr, flush=True)


def _send(children: list[Child], number: int) -> None:
    for child in children:
        child.send(number)
