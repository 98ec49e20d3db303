"""Processes that something else has started (torchrun, Kubernetes, srun), each running ``moba-train train``.

Rank 0 composes, prepares the data and makes the run directory; the others wait for its ``resolved.yaml``. All of them
compose the same settings from the same command line, so that file has come when it says what they composed themselves:
one left by an earlier start with other settings is not taken for it.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

from moba_train.config import LaunchConfig, LaunchKind

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL_SECONDS = 0.2


def settle(launch: LaunchConfig) -> LaunchConfig:
    """The processes and nodes that the environment names.

    Raises:
        ValueError: it names none, or others than the settings.
    """
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"launch=environment and {', '.join(missing)} not set: start it with torchrun or another launcher that "
            f"sets {', '.join(_NEEDED)}, or choose launch=local"
        )
    numbers = ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_WORLD_SIZE")
    for name in numbers:
        if not os.environ.get(name, "1").isdecimal():
            raise ValueError(f"launch=environment and {name}={os.environ[name]}: it must be a number")
    size = int(os.environ["WORLD_SIZE"])
    counted = launch.processes or launch.gpus or launch.gpus_per_node
    if counted and launch.world_size != size:
        raise ValueError(f"{launch.counted} and WORLD_SIZE={size}: leave the former to the environment")
    nodes = max(1, size // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if launch.gpus_per_node is not None:  # the nodes are counted with them
        return launch
    return replace(launch, nodes=nodes, processes=None if launch.gpus else size)


def follows(launch: LaunchConfig) -> bool:
    """Whether another process leads this one."""
    return launch.kind is LaunchKind.environment and os.environ.get("RANK") != "0"


def wait_for(file: Path, content: str, minutes: float) -> None:
    """
    Raises:
        ValueError: within ``minutes`` the file did not come to hold ``content``.
    """
    limit = time.monotonic() + 60 * minutes
    while not (file.is_file() and file.read_text() == content):
        if time.monotonic() > limit:
            raise ValueError(
                f"rank {os.environ['RANK']} waited {minutes:g} minutes for rank 0 to write its own settings to {file}: "
                f"give all ranks the same command and a shared run.dir; raise launch.timeout_minutes where preparing "
                f"the data takes longer, or run moba-train prepare before"
            )
        time.sleep(_POLL_SECONDS)
