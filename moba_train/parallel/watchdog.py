"""Ends a rank that makes no progress, and says where it stands, which the time-out of a collective does not know.

The rank to blame may be asleep or stopped and unable to speak; then the others tell where they wait for it, and the
launcher ends it with them.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time

EXIT_CODE = 5


class Watchdog:
    """Ends this process, with the stacks of its threads, when ``beat`` was not called for ``minutes``.

    It watches from the first ``beat`` on: before that a checkpoint may be converted, however long that takes.

    Args:
        rank: told in the message
        minutes: ``launch.timeout_minutes``
    """

    def __init__(self, rank: int, minutes: float) -> None:
        self._rank, self._minutes = rank, minutes
        self._doing = ""
        self._last = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str) -> None:
        """Progress was made; ``doing``, such as "step 12", has just begun."""
        self._doing, self._last = doing, time.monotonic()
        if not self._thread.ident:
            self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while (left := self._last + 60 * self._minutes - time.monotonic()) > 0:
            if self._stopped.wait(left):
                return
        print(
            f"error: rank {self._rank} on {socket.gethostname()} made no progress for {self._minutes:g} minutes "
            f"(launch.timeout_minutes) in {self._doing}; its threads stand at:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_CODE)  # the main thread may never return from where it is
