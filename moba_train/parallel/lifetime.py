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

CLAIM = "MOBA_TRAIN_CLAIM"  # the descriptor of a claim that the launcher hands down to its processes
_PR_SET_PDEATHSIG = 1


def follow_parent() -> None:
    """End this process when its parent ends, however that ends; also past an exec. Does nothing outside Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def claim(folder: Path) -> IO[str]:
    """Claim a run directory for as long as the returned file is open, here or in a process that inherited it.

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


def inherit_or_claim(folder: Path) -> IO[str]:
    """The claim that our launcher handed down, else one of this process's own.

    Raises:
        ValueError: another process has it.
    """
    handed = os.environ.get(CLAIM)
    return os.fdopen(int(handed), "w") if handed else claim(folder)
