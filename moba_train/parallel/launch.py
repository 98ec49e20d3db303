"""Start the processes of a run and wait for them: on this machine, over ssh, as a batch job, or started already.

The worker is a process of its own, also when it is the only one: Hydra stays with the command line, two runs of a
sweep never share DeepSpeed's state, and a crash leaves the launcher alive to say so.
"""

from __future__ import annotations

import random
import shlex
from dataclasses import replace
from pathlib import Path
from typing import IO

from moba_train.config import Device, LaunchConfig, LaunchKind
from moba_train.parallel import hostfile, hosts, local, slurm, ssh, started, variables

_REMOTE_PORTS = range(20000, 32000)  # below those that Linux gives to outgoing connections


def settle(launch: LaunchConfig) -> LaunchConfig:
    """The launch with everything that the start decides: how many processes and nodes, and the port.

    Raises:
        ValueError: naming the setting, its value and the fix.
    """
    _check_counts(launch)
    if launch.kind is LaunchKind.hostfile:
        used = hostfile.choose(launch)
        launch = replace(launch, nodes=len(used))
        if launch.gpus_per_node is None and launch.gpus is None:
            launch.processes = sum(host.processes for host in used)
        return replace(launch, port=launch.port or random.choice(_REMOTE_PORTS))
    if launch.kind is LaunchKind.slurm:
        slurm.settle(launch)
        return launch
    if launch.kind is LaunchKind.environment:
        return started.settle(launch)
    return replace(launch, port=launch.port or local.free_port())


def check(launch: LaunchConfig) -> None:
    """What only the machines know, before anything is prepared.

    Raises:
        ValueError: naming the host, the value and the setting.
    """
    if launch.kind is LaunchKind.hostfile:
        hosts.check(launch)
    elif launch.kind is LaunchKind.slurm:
        slurm.check()
    elif launch.kind is LaunchKind.local and not local.port_is_free(launch.port):
        raise ValueError(f"launch.port={launch.port} is in use on this machine: choose another, or 0 for any free one")


def run(launch: LaunchConfig, resolved: Path, claim: IO[str] | None = None) -> int:
    """Print the command that starts the processes, and run them to their end. ``launch.dry_run`` stops at the former,
    and prints the environment too, to be pasted into a shell.

    Args:
        resolved: ``resolved.yaml`` in the run directory
        claim: on the run directory: handed down to processes of this machine, given up for those of others

    Returns:
        0, or the exit code of the first process that failed; 128 + the signal's number where a signal ended it.
    """
    if launch.kind is LaunchKind.slurm:
        _give_up(claim)
        return slurm.run(launch, resolved)
    if launch.kind is LaunchKind.hostfile:
        used = hostfile.choose(launch)
        commands = ssh.commands(launch, used, resolved)
        for command in commands:
            print(f"command: {shlex.join(command)}", flush=True)
        if launch.dry_run:
            return 0
        _give_up(claim)
        return ssh.run(used, commands)
    if launch.kind is LaunchKind.environment:
        environments = [variables.of_processes(launch, resolved.parent)]
    else:
        environments = local.environments(launch, resolved.parent)
    if not started.follows(launch):
        # With its environment it is half a page.
        shown = local.shell(environments, resolved) if launch.dry_run else shlex.join(local.command(resolved))
        print(f"command: {shown}", flush=True)
    return 0 if launch.dry_run else local.run(environments, resolved, claim)


def _give_up(claim: IO[str] | None) -> None:
    """Rank 0 of another machine takes it."""
    if claim is not None:
        claim.close()


def _check_counts(launch: LaunchConfig) -> None:
    counts = {
        "launch.processes": launch.processes,
        "launch.gpus": launch.gpus,
        "launch.nodes x launch.gpus_per_node": launch.gpus_per_node and launch.nodes * launch.gpus_per_node,
    }
    given = {key: count for key, count in counts.items() if count is not None}
    for key, count in {"launch.nodes": launch.nodes, **given}.items():
        if count < 1:
            raise ValueError(f"{key}={count}: must be at least 1")
    if len(set(given.values())) > 1:
        raise ValueError(f"{' and '.join(f'{key}={count}' for key, count in given.items())} differ: give one of them")
    if launch.device is Device.cpu and (launch.gpus or launch.gpus_per_node):
        raise ValueError(f"{launch.counted} with launch.device=cpu: give launch.processes={launch.world_size} instead")
    if launch.kind is LaunchKind.local and launch.nodes != 1:
        raise ValueError(f"launch.nodes={launch.nodes} with launch=local: choose launch=hostfile or launch=slurm")
    for key in ("hostfile", "ssh_options"):
        if (value := getattr(launch, key)) and launch.kind is not LaunchKind.hostfile:
            raise ValueError(f"launch.{key}={value} with launch={launch.kind.name}: choose launch=hostfile")
    if launch.python is not None and launch.kind in (LaunchKind.local, LaunchKind.environment):
        raise ValueError(
            f"launch.python={launch.python} with launch={launch.kind.name}, which takes this command's: drop it, or "
            f"choose launch=hostfile or launch=slurm"
        )
