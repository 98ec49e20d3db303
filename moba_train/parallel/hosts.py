"""Whether the machines of ``launch.hostfile`` can run a run: each is asked over ssh, all at once."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from moba_train.config import Device, LaunchConfig
from moba_train.parallel import probe, ssh
from moba_train.parallel.hostfile import Host, choose
from moba_train.parallel.supervise import SSH_FAILED

_NAME_SECONDS = 15.0  # three tries of a name server's client
_PROBE_SECONDS = 120.0  # a cold file system takes its time to import torch


def check(launch: LaunchConfig) -> None:
    """Log in to every machine at once, and compare it with this one.

    Raises:
        ValueError: the first machine, in the file's order, that cannot be reached, runs other versions, has too few
            GPUs, or where the port is in use: naming it, the values and the fix.
    """
    hosts = choose(launch)
    with ThreadPoolExecutor(len(hosts)) as pool:
        found = list(pool.map(lambda host: _probe(launch, host, first=host is hosts[0]), hosts))
    own = probe.versions()
    for host, facts in zip(hosts, found, strict=True):
        for name, version in own.items():
            if facts["versions"].get(name) != version:
                raise ValueError(
                    f"{host.name} has {name} {facts['versions'].get(name)} and this machine has {version}: install the "
                    f"same on both, or set launch.python to an interpreter that has it"
                )
        if not facts["port_is_free"]:
            raise ValueError(f"launch.port={launch.port} is in use on {host.name}: choose another")
        needed = host.processes if launch.needs_gpus or any(each["gpus"] for each in found) else 0
        if facts["gpus"] < needed:
            raise ValueError(
                f"{host.name} is to run {host.processes} processes and has {facts['gpus']} GPUs: lower its slots in "
                f"launch.hostfile={launch.hostfile}, or set launch.device=cpu and launch.processes"
            )


def _find(launch: LaunchConfig, host: Host) -> None:
    """Refuse a machine whose name no server says anything about; that there is none of that name is for ssh to say."""
    name = ssh.looked_up(launch, host.name)
    if name is None:
        return
    answered = threading.Event()

    def ask() -> None:
        with suppress(OSError):
            socket.getaddrinfo(name, None)
        answered.set()

    threading.Thread(target=ask, daemon=True).start()  # nothing stops a look-up
    if not answered.wait(_NAME_SECONDS):
        raise ValueError(
            f"no name server told the address of {name} within {_NAME_SECONDS:g} s: write {host.name}'s address in "
            f"launch.hostfile={launch.hostfile} or /etc/hosts, or repair name resolution"
        )


def _probe(launch: LaunchConfig, host: Host, first: bool) -> dict[str, Any]:
    arguments = ["--port", str(launch.port)] if first else []
    if launch.device is not Device.cpu:
        arguments.append("--gpus")
    python = launch.python or sys.executable
    command = ssh.command(launch, host.name, ["-m", "moba_train.parallel.probe", *arguments], {})
    try:
        _find(launch, host)
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{host.name} did not answer within {_PROBE_SECONDS:g} s: look at it, or leave it out"
        ) from None
    except OSError as error:
        raise ValueError(f"launch=hostfile needs ssh on this machine ({error})") from None
    said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
    if done.returncode == SSH_FAILED:
        raise ValueError(
            f"{host.name} cannot be reached over ssh ({said}): it must let `ssh {host.name} true` in without a "
            f"password; launch.ssh_options sets port and key"
        )
    if done.returncode:
        raise ValueError(
            f"{host.name} cannot run {python} -m moba_train in {Path.cwd()} ({said}): the package and this folder must "
            f"be there too; launch.python names another interpreter"
        )
    return json.loads(done.stdout.splitlines()[-1])
