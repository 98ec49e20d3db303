"""The ranks of other machines, over ssh: on each, one process that starts its ranks and ends them.

DeepSpeed's launcher has no ssh of its own but pdsh, ends a run with ``pkill -f`` of a command line that the user's
other runs share, and leaves the ranks of the other machines waiting in a collective when one machine fails. Here the
life of a machine's ranks hangs on its connection: see ``node``. Where it has to be DeepSpeed's, it takes the same
hostfile and worker: ``deepspeed --hostfile HOSTS --module moba_train.worker --config RUN/resolved.yaml``.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from signal import SIGHUP, SIGKILL

from moba_train.config import LaunchConfig
from moba_train.parallel import lifetime, supervise, variables
from moba_train.parallel.hostfile import Host
from moba_train.redact import redact

_OPTIONS = ("BatchMode=yes", "ConnectTimeout=15", "ServerAliveInterval=15", "ServerAliveCountMax=4")
_PASSED = ("NCCL_", "TORCH_", "GLOO_", "UCX_", "FI_", "PYTHON", "PYTORCH_", "TRITON_", "HF_", "OMP_", "LD_LIBRARY_PATH")
_CONFIGURATION_SECONDS = 15.0  # ssh's own configuration may run commands (Match exec) and ask name servers
_CLOSE_SECONDS = 5.0  # for a machine to end its ranks, once told to


class Remote:
    """A machine's ranks, through the ssh that holds them."""

    def __init__(self, host: str, command: Sequence[str]) -> None:
        self.name = host
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, start_new_session=True, preexec_fn=lifetime.follow_parent
        )
        self._closed_at: float | None = None

    def poll(self) -> int | None:
        return self._process.poll()

    def send(self, number: int) -> None:
        """Pass a signal on. SIGHUP and SIGKILL end the connection, and with it the machine's ranks; where that does not
        end within _CLOSE_SECONDS, the next of them ends ssh itself.
        """
        assert self._process.stdin is not None
        if self._process.returncode is not None:
            return
        with suppress(OSError):  # it has just ended
            if number not in (SIGHUP, SIGKILL):
                self._process.stdin.write(f"{int(number)}\n".encode())
                self._process.stdin.flush()
            elif self._closed_at is None:
                self._closed_at = time.monotonic()
                self._process.stdin.close()
            elif time.monotonic() > self._closed_at + _CLOSE_SECONDS:
                self._process.kill()  # the machine does not answer


def command(launch: LaunchConfig, host: str, arguments: Sequence[str], environment: dict[str, str]) -> list[str]:
    """ssh to ``host`` and run Python with ``arguments`` there, in the folder of this process."""
    python = launch.python or sys.executable
    given = _passed() | environment
    words = [f"{key}={value}" for key, value in given.items()]
    remote = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(['env', *words, python, *arguments])}"
    options = [word for option in _OPTIONS for word in ("-o", option)]
    return ["ssh", *launch.ssh_options, *options, host, remote]


def looked_up(launch: LaunchConfig, host: str) -> str | None:
    """The name that ssh has to find the address of, after its own configuration; None where a proxy does so.

    Raises:
        ValueError: ssh does not come to an end with that.
        OSError: there is no ssh.
    """
    asked = ["ssh", "-G", *launch.ssh_options, host]
    try:
        done = subprocess.run(
            asked, capture_output=True, text=True, timeout=_CONFIGURATION_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"`{shlex.join(asked)}` did not end within {_CONFIGURATION_SECONDS:g} s: a Match exec line of ssh's "
            f"configuration waits, or a name server; mend it, or name another file with launch.ssh_options=[-F,FILE]"
        ) from None
    settings = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    behind = {settings.get(key, "none") for key in ("proxyjump", "proxycommand")} != {"none"}
    return None if behind else settings.get("hostname", host)


def commands(launch: LaunchConfig, hosts: Sequence[Host], resolved: Path) -> list[list[str]]:
    """The command for each machine. The first one's name is where the ranks meet."""
    world_size = sum(host.processes for host in hosts)
    environment = variables.of_processes(launch, resolved.parent)
    environment |= {"MASTER_ADDR": hosts[0].name, "MASTER_PORT": str(launch.port)}
    made, first = [], 0
    for host in hosts:
        place = {"--first-rank": first, "--processes": host.processes, "--world-size": world_size}
        arguments = [word for key, value in place.items() for word in (key, str(value))]
        arguments = ["-m", "moba_train.parallel.node", "--config", str(resolved), *arguments]
        made.append(command(launch, host.name, arguments, environment))
        first += host.processes
    return made


def run(hosts: Sequence[Host], commands: Sequence[Sequence[str]]) -> int:
    """Run the machines' ranks to their end, see ``supervise.run``."""
    return supervise.run(partial(Remote, host.name, each) for host, each in zip(hosts, commands, strict=True))


def _passed() -> dict[str, str]:
    """Settings of this process's environment that a rank needs too; no keys, for a command line is no place for one."""
    own = {key: value for key, value in os.environ.items() if key.startswith(_PASSED)}
    return {key: value for key, value in own.items() if redact({key: value}) == {key: value}}
