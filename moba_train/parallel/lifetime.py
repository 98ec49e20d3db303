"""Processes of a run end together, and only one run writes to a directory.

A launcher killed outright cannot forward its end, so the kernel is asked to (Linux ``PR_SET_PDEATHSIG``): a worker left
behind would go on writing checkpoints beside the one that resumes.
"""

from __future__ import annotations

import ctypes
import fcntl
import signal
import sys
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1


def follow_parent() -> None:
    """End this process when its parent ends, however that ends; also past an exec. Does nothing outside Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


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
