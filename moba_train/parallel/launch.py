"""Start the processes of a run and wait for them.

The worker is a process tree of its own, also when it is one process: Hydra stays with the command line, two runs of a
sweep never share DeepSpeed's state, and a crash leaves the launcher alive to say so.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from moba_train.config import LaunchConfig
from moba_train.parallel import lifetime


def command(launch: LaunchConfig, resolved: Path) -> list[str]:
    """The command line of a run's processes."""
    worker = ["-m", "moba_train.worker", "--config", str(resolved)]
    if launch.processes == 1:
        return [sys.executable, *worker]
    port = launch.port or _free_port()
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={launch.processes}"),
        *("--master-addr=127.0.0.1", f"--master-port={port}", *worker),
    ]


def run(launch: LaunchConfig, resolved: Path) -> int:
    """Run the processes to their end.

    A SIGTERM or SIGINT to this process is passed on, and waited out, so that nothing is left running.

    Returns:
        The exit code; 128 + the signal's number where a signal ended it.
    """
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Idle OpenMP threads that spin slow every small operation down as soon as another process wants a core.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("OMP_NUM_THREADS", str(launch.threads or _threads(launch.processes)))
    environment[lifetime.FOLLOW_PARENT] = "1"
    process = subprocess.Popen(
        command(launch, resolved), env=environment, start_new_session=True, preexec_fn=lifetime.follow_parent
    )

    def forward(number: int, _frame) -> None:
        os.killpg(process.pid, number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _threads(processes: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // processes)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
