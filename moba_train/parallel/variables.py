"""The environment that a launch gives its processes, beside the user's own."""

from __future__ import annotations

import os
from pathlib import Path

from moba_train.config import Device, LaunchConfig

PYTHON = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",  # a stack on a segmentation fault
    "TOKENIZERS_PARALLELISM": "false",
    # Idle OpenMP threads that spin slow every small operation down as soon as another process wants a core.
    "OMP_WAIT_POLICY": "PASSIVE",
}
# Contexts grow from stage to stage, and ZeRO 3 gathers and frees all the time: blocks of fixed size kept up to a third
# more than was in use. Under its older name it is the user's own.
ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
NCCL = {
    "NCCL_DEBUG": "WARN",  # one line with the cause, where NCCL fails
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",  # torch's default, said aloud: a collective past its time-out ends the rank
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",  # and leaves each rank's last collectives in the run directory
    "TORCH_FR_BUFFER_SIZE": "2000",
}


def of_processes(launch: LaunchConfig, folder: Path) -> dict[str, str]:
    """What every process of a run is given: ours where the user's environment has none, then ``launch.environment``.

    ``folder`` is the run directory, where NCCL leaves its traces.
    """
    ours = dict(PYTHON)
    if launch.device is not Device.cpu:
        ours |= {**NCCL, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(folder / "nccl_trace_rank_")}
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ | launch.environment:
            ours |= ALLOCATOR
    return _unset(ours) | launch.environment


def of_threads(threads: int) -> dict[str, str]:
    """CPU threads of a process, unless the user's environment says."""
    return _unset({"OMP_NUM_THREADS": str(threads)})


def _unset(ours: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in ours.items() if key not in os.environ}


def of_rank(
    rank: int, local_rank: int, world_size: int, local_world_size: int, master: tuple[str, int]
) -> dict[str, str]:
    """What torch.distributed reads: a process's place, and where rank 0 listens (address, port)."""
    return {
        "MASTER_ADDR": master[0],
        "MASTER_PORT": str(master[1]),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
    }
