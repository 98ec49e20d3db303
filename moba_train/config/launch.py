"""How many processes a run has, where they run, and who starts them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Device(Enum):
    """``auto`` takes CUDA where torch sees one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class LaunchKind(Enum):
    """Who starts the processes. ``local``: this command, on this machine. ``hostfile``: this command, over ssh.
    ``slurm``: a batch job that is submitted. ``environment``: they are started already, each running this command
    (torchrun, Kubernetes, srun), and RANK, WORLD_SIZE and MASTER_ADDR are set."""

    local = "local"
    hostfile = "hostfile"
    slurm = "slurm"
    environment = "environment"


@dataclass
class SlurmConfig:
    """The batch job that ``launch=slurm`` writes to ``<run>/launch.sbatch`` and submits."""

    partition: str | None = None
    account: str | None = None
    time: str | None = None  # the limit, as sbatch reads it: 24:00:00
    options: dict[str, str] = field(default_factory=dict)  # more of sbatch: +launch.slurm.options.qos=high
    setup: list[str] = field(default_factory=list)  # shell lines before the ranks start: [module load cuda]
    save_seconds: int = 300  # before the time limit the run saves, ends and is queued again; 0: it does not
    wait: bool = False  # until the job has ended; False: return when it is submitted


@dataclass
class LaunchConfig:
    """The processes (ranks) of a run. Their number is ``processes``, or a GPU each: ``gpus``, or ``gpus_per_node`` of
    each node. With a hostfile all its slots are used where none of these is set."""

    kind: LaunchKind = LaunchKind.local
    processes: int | None = None  # on all nodes together; None: see gpus, gpus_per_node, else one a node
    gpus: int | None = None  # on all nodes together
    gpus_per_node: int | None = None
    nodes: int = 1  # machines
    device: Device = Device.auto
    threads: int = 0  # CPU threads a process; 0: the cores shared out
    port: int = 0  # of the rendezvous, on the first node; 0: any free one
    timeout_minutes: float = 30.0  # of a collective operation, and of a step's part without progress: the run ends
    environment: dict[str, str] = field(default_factory=dict)  # of every process: +launch.environment.NAME=VALUE
    dry_run: bool = False  # check and write the settings, print the exact command, start nothing
    hostfile: str | None = None  # DeepSpeed's format, a line a machine: HOST slots=N
    ssh_options: list[str] = field(default_factory=list)  # arguments of every ssh: [-p, "2222", -i, KEY]
    python: str | None = None  # on the other machines; None: this command's own path
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    @property
    def world_size(self) -> int:
        """Processes on all nodes together."""
        if self.gpus_per_node is not None:
            return self.nodes * self.gpus_per_node
        return self.processes or self.gpus or self.nodes

    @property
    def counted(self) -> str:
        """The setting that says ``world_size``, with its value, for messages."""
        if self.gpus_per_node is not None:
            return f"launch.nodes={self.nodes} x launch.gpus_per_node={self.gpus_per_node}"
        return f"launch.gpus={self.gpus}" if self.gpus is not None else f"launch.processes={self.world_size}"

    @property
    def needs_gpus(self) -> bool:
        """Every process must have a GPU: by name, or because GPUs were counted."""
        return self.device is Device.cuda or self.gpus is not None or self.gpus_per_node is not None
