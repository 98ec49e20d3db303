"""Start the processes of a run and wait for them.

The worker is a process of its own, also when it is the only one: Hydra stays with the command line, two runs of a
sweep never share DeepSpeed's state, and a crash leaves the launcher alive to say so.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from moba_train.config import LaunchConfig
from moba_train.parallel import lifetime

_POLL_SECONDS = 0.05
_TERM_SECONDS = 10.0  # from SIGTERM to SIGKILL


def command(resolved: Path) -> list[str]:
    """The command line of each process; its environment tells it its rank."""
    return [sys.executable, "-m", "moba_train.worker", "--config", str(resolved)]


def run(launch: LaunchConfig, resolved: Path, claim: IO[str] | None = None) -> int:
    """Run the processes to their end; when one fails, end the others.

    A SIGTERM or SIGINT to this process is passed on, and waited out, so that nothing is left running. The processes
    inherit ``claim``, so that it lasts as long as any of them; without one, rank 0 claims the run directory.

    Returns:
        0, or the exit code of the first process that failed; 128 + the signal's number where a signal ended it.
    """
    processes: list[subprocess.Popen[bytes]] = []
    received: list[int] = []
    handed = [claim.fileno()] if claim else []

    def forward(number: int, _frame) -> None:
        received.append(number)
        _send(processes, number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for environment in environments(launch):
            environment.update((lifetime.CLAIM, str(descriptor)) for descriptor in handed)
            processes.append(
                subprocess.Popen(
                    command(resolved),
                    env=environment,
                    pass_fds=handed,
                    start_new_session=True,
                    preexec_fn=lifetime.follow_parent,
                )
            )
        if received:  # while they were being started
            _send(processes, received[0])
        code = _wait(processes)
    finally:
        _send(processes, signal.SIGKILL)  # none is left, unless this process itself fails
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def environments(launch: LaunchConfig) -> list[dict[str, str]]:
    """Each rank's environment, with what torch.distributed reads from it."""
    shared = dict(os.environ, PYTHONUNBUFFERED="1")
    shared.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Idle OpenMP threads that spin slow every small operation down as soon as another process wants a core.
    shared.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    shared.setdefault("OMP_NUM_THREADS", str(launch.threads or _threads(launch.processes)))
    size = str(launch.processes)
    shared.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(launch.port or _free_port()))
    shared.update(WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    return [dict(shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(launch.processes)]


def _wait(processes: list[subprocess.Popen[bytes]]) -> int:
    """The code of the first process to fail (the lowest rank's of several), once all have ended; 0 if none did."""
    first = 0
    kill_at = float("inf")
    while True:
        codes = [process.poll() for process in processes]
        if not first and (first := next((code for code in codes if code), 0)):
            _send(processes, signal.SIGTERM)
            kill_at = time.monotonic() + _TERM_SECONDS
        if None not in codes:
            return first
        if time.monotonic() > kill_at:
            _send(processes, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def _send(processes: list[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        if process.returncode is None:  # a number whose exit code was read may be another process's by now
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)


def _threads(processes: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // processes)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
