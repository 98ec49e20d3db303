"""A real SLURM on this machine: munged, slurmctld and two slurmd, each a node of its own, all in one scratch folder.

Debian: apt-get install slurmctld slurmd munge. It needs no root, no cgroups and no configuration of the system's.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moba_train.parallel import local

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
_READY_SECONDS = 30

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
InactiveLimit=0
MpiDefault=none
SchedulerParameters=sched_min_interval=100000
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""


def installed() -> bool:
    return all(shutil.which(name, path=_PATH) for name in PROGRAMS)


@contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """The environment in which sbatch and its like speak to the cluster."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path is short
    folder.chmod(0o711)  # as munged wants it
    environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": f"{folder}/slurm.conf"}
    daemons: list[subprocess.Popen] = []

    def start(name: str, *command: str) -> None:
        log = open(folder / f"{name}.log", "w")  # noqa: SIM115, it is the daemon's
        daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
        log.close()

    try:
        _write(folder)
        own = [
            f"--{key}={folder}/munge.{key.partition('-')[0]}" for key in ("socket", "pid-file", "seed-file", "log-file")
        ]
        start("munged", "munged", "--foreground", f"--key-file={folder}/munge.key", *own)
        _until(lambda: (folder / "munge.socket").exists(), folder)
        start("slurmctld", "slurmctld", "-D", "-i")
        for node in ("node1", "node2"):
            start(node, "slurmd", "-D", "-N", node)
        _until(lambda: _idle_nodes(environment) == 2, folder)
        yield environment
    finally:
        subprocess.run(["scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}"], env=environment)
        _until(lambda: not _told(environment, "squeue", "-h"), folder)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path) -> None:
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(1024))
    (folder / "state").mkdir()
    ports = [local.free_port() for _ in range(3)]
    settings = {"host": socket.gethostname(), "user": getpass.getuser(), "folder": folder, "ports": ports}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**settings))


def _idle_nodes(environment: dict[str, str]) -> int:
    return _told(environment, "sinfo", "-hN", "-o", "%T").split().count("idle")


def _told(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def _until(ready, folder: Path) -> None:
    limit = time.monotonic() + _READY_SECONDS
    while not ready():
        if time.monotonic() > limit:
            logs = "\n".join(f"{file.name}: {file.read_text()[-2000:]}" for file in folder.glob("*.log"))
            raise RuntimeError(f"no SLURM within {_READY_SECONDS} s\n{logs}")
        time.sleep(0.1)
