"""The machines of ``launch.hostfile``: which of them a run uses, and whether they can run it.

DeepSpeed's own format, so that one file serves both: a line a machine, ``HOST slots=N``; the slots are processes.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moba_train.config import Device, LaunchConfig
from moba_train.parallel import probe, ssh
from moba_train.parallel.supervise import SSH_FAILED

_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
_NAME_SECONDS = 15.0  # three tries of a name server's client
_PROBE_SECONDS = 120.0  # a cold file system takes its time to import torch


@dataclass(frozen=True)
class Host:
    """A machine and the processes it is given."""

    name: str
    processes: int


def read(path: str | None) -> list[Host]:
    """The machines of a hostfile, in its order, with all their slots.

    Raises:
        ValueError: naming the file, and the line that cannot be used.
    """
    if path is None:
        raise ValueError("launch.hostfile is not given: name a file with a line a machine, HOST slots=N")
    try:
        lines = Path(path).expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"launch.hostfile={path} cannot be read ({error})") from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None or match[2] == "0" or match[1].startswith("-"):
            raise ValueError(f"launch.hostfile={path} line {number} is {text!r}: write HOST slots=N, N at least 1")
        if match[1] in [host.name for host in hosts]:
            raise ValueError(f"launch.hostfile={path} line {number} names {match[1]} again: give it one line")
        hosts.append(Host(match[1], int(match[2])))
    if not hosts:
        raise ValueError(f"launch.hostfile={path} names no machine: write a line for each, HOST slots=N")
    return hosts


def choose(launch: LaunchConfig) -> list[Host]:
    """The first machines that give as many processes as were asked for; all slots of all where nothing was.

    Raises:
        ValueError: there are fewer, naming the machine, its slots and the setting.
    """
    hosts = read(launch.hostfile)
    if launch.nodes > len(hosts):
        raise ValueError(
            f"launch.nodes={launch.nodes} and launch.hostfile={launch.hostfile} names {len(hosts)}: add the "
            f"others, or lower launch.nodes"
        )
    if launch.nodes > 1:
        hosts = hosts[: launch.nodes]
    if each := launch.gpus_per_node:
        for host in hosts:
            if host.processes < each:
                raise ValueError(
                    f"launch.gpus_per_node={each} and {host.name} has slots={host.processes} in launch.hostfile="
                    f"{launch.hostfile}: lower the one, or raise the other"
                )
        return [Host(host.name, each) for host in hosts]
    left = launch.gpus or launch.processes
    if left is None:
        return hosts
    used: list[Host] = []
    for host in hosts:
        if left:
            used.append(Host(host.name, min(left, host.processes)))
            left -= used[-1].processes
    if left:
        slots = sum(host.processes for host in hosts)
        raise ValueError(f"{launch.counted} and launch.hostfile={launch.hostfile} has {slots} slots: add machines")
    return used


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
