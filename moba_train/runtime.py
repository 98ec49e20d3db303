"""This process's place in the run: rank, device, process group, seeds, and who may print."""

from __future__ import annotations

import logging
import os
import random
import socket
import warnings
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from moba_train import meeting
from moba_train.config import Device, LaunchConfig

log = logging.getLogger("moba_train")


@dataclass(frozen=True)
class Runtime:
    """One rank of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    sequence_parallel_size: int = 1  # neighbouring ranks that share each row

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def sequence_parallel_rank(self) -> int:
        """Which slice of its rows this rank has."""
        return self.rank % self.sequence_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        """Which rows this rank has a slice of."""
        return self.rank // self.sequence_parallel_size

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // self.sequence_parallel_size


def start(launch: LaunchConfig, sequence_parallel_size: int = 1) -> Runtime:
    """Choose the device and join the process group that RANK and WORLD_SIZE name, or one of its own without them.

    Raises:
        ValueError: GPUs are asked for where torch sees fewer of them than this machine has processes, the process
            group cannot be joined, or its ranks do not make whole sequence-parallel groups.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size % sequence_parallel_size:  # ranks that something else started were counted nowhere before
        raise ValueError(
            f"train.sequence_parallel_size={sequence_parallel_size} does not divide WORLD_SIZE={world_size}: start a "
            f"multiple of {sequence_parallel_size} ranks"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    device = choose_device(launch, local_rank, local_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(launch.threads or max(1, cores // local_size))
    gpu = device if device.type == "cuda" else None
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=launch.timeout_minutes)
    if world_size == 1:
        # An in-process store: a single process needs no port and no second process.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout, device_id=gpu)
    else:
        try:
            store, rank, world_size = meeting.rendezvous(timeout)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=gpu
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ValueError(
                f"{socket.gethostname()} cannot join the run at {where} ({str(error).splitlines()[0][:200]}): choose a "
                f"launch.port that is free on the first node and that the others can reach"
            ) from None
    configure_logging(rank)
    return Runtime(rank, world_size, local_rank, device, sequence_parallel_size)


def choose_device(launch: LaunchConfig, local_rank: int, processes: int) -> torch.device:
    """``auto`` takes CUDA where torch sees a GPU; then every one of this machine's ``processes`` must have its own."""
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if launch.device is Device.cpu or (not launch.needs_gpus and seen == 0):
        return torch.device("cpu")
    if seen < processes:
        fewer = f"start at most {seen} there, or " if seen else ""
        raise ValueError(
            f"{launch.counted} with {seen} GPUs seen on {socket.gethostname()} for its {processes} processes: {fewer}"
            f"set launch.processes and launch.device=cpu in their place"
        )
    return torch.device("cuda", local_rank)


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def configure_logging(rank: int) -> None:
    """Rank 0 speaks; the others only warn. DeepSpeed's and transformers' own chatter is for debugging."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.raiseExceptions = False  # on a full disk W&B's own log would print a traceback a line, and hide our error
    disable_progress_bar()
    # Of torch to DeepSpeed, at every collective under ZeRO 3; there is nothing that a user could do.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    for name in ("DeepSpeed", "transformers", "datasets", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch alike on every rank: ranks must build the same model."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
