"""The ranks of this machine: each a process of its own, also where it is the only one.

torchrun would do the same with less: killed outright, it leaves its ranks running (seen with torch 2.13), it cannot
hand a claim on the run directory down, and a rank that fails is told in a page of its own.
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO

from moba_train.config import LaunchConfig
from moba_train.parallel import lifetime, supervise, variables

HOST = "127.0.0.1"


def command(resolved: Path) -> list[str]:
    """The command line of a rank; its environment tells it which."""
    return [sys.executable, "-m", "moba_train.worker", "--config", str(resolved)]


def environments(launch: LaunchConfig, folder: Path) -> list[dict[str, str]]:
    """What each rank is given beside this process's own environment."""
    size = launch.world_size
    shared = variables.of_threads(launch.threads or threads(size)) | variables.of_processes(launch, folder)
    master = (HOST, launch.port or free_port())
    return [shared | variables.of_rank(rank, rank, size, size, master) for rank in range(size)]


def run(added: Sequence[dict[str, str]], resolved: Path, claim: IO[str] | None) -> int:
    """Run a rank for each environment to their end, see ``supervise.run``. They inherit ``claim``, so that it lasts as
    long as any of them; without one, rank 0 claims the run directory."""
    handed = [claim.fileno()] if claim else []
    claimed = {lifetime.CLAIM: str(claim.fileno())} if claim else {}

    def start(environment: dict[str, str]) -> supervise.Process:
        whole = {**os.environ, **environment, **claimed}
        return supervise.Process(f"rank {whole['RANK']}", command(resolved), whole, handed)

    return supervise.run(partial(start, environment) for environment in added)


def shell(added: Sequence[dict[str, str]], resolved: Path) -> str:
    """The same as one line of shell, to be repeated in the folder it was started from."""
    line = shlex.join(command(resolved))
    if len(added) == 1:
        return f"{assignments(added[0])} {line}"
    shared = {key: value for key, value in added[0].items() if key not in ("RANK", "LOCAL_RANK")}
    ranks = " ".join(environment["RANK"] for environment in added)
    return f"for rank in {ranks}; do RANK=$rank LOCAL_RANK=$rank {assignments(shared)} {line} & done; wait"


def assignments(environment: dict[str, str]) -> str:
    return " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items())


def threads(processes: int) -> int:
    """CPU threads of a process where ``processes`` share this machine."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def port_is_free(port: int) -> bool:
    """Whether rank 0 could listen there, on all of this machine's addresses."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
