"""Processes of a run end together, and only one run writes to a directory.

A launcher killed outright cannot forward its end, so the kernel is asked to (Linux ``PR_SET_PDEATHSIG``): a worker left
behind would go on writing checkpoints beside the one that resumes.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
from pathlib import Path
from typing import IO

FOLLOW_PARENT = "MOBA_TRAIN_FOLLOW_PARENT"  # set by our launcher for all processes below it
_PR_SET_PDEATHSIG = 1


def follow_parent() -> None:
    """End this process when its parent ends, however that ends. Does nothing outside Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def follow_launcher() -> None:
    """``follow_parent`` where our launcher started this process; one started by hand or by a cluster stays free."""
    if os.environ.get(FOLLOW_PARENT):
        follow_parent()


def claim(folder: Path) -> IO[str]:
    """Claim a run directory for as long as the returned file is open; it goes with the process.

    Raises:
        ValueError: another process has it.
    """
    stream = (folder / ".lock").open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise ValueError(
            f"{folder} is being written by another process: wait for it, or choose another run.name"
        ) from None
    return stream
