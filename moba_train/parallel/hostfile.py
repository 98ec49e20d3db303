"""The machines of ``launch.hostfile``, and which of them a run uses.

DeepSpeed's own format, so that one file serves both: a line a machine, ``HOST slots=N``; the slots are processes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from moba_train.config import LaunchConfig

_LINE = re.compile(r"(\S+)\s+slots=(\d+)")


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
