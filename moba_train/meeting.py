"""The rendezvous of ranks, also of ranks that are started again and find the store of those before them.

torchrun keeps its store when it starts ranks again, and in it the addresses of those before. Its count of restarts does
not tell the starts apart: an agent that ends its ranks because another's have failed does not count that.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist

_POLL_SECONDS = 0.2


def rendezvous(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """A store in which no start before this one has left anything, the rank and the number of ranks, as the environment
    has them. All ranks call it.

    Raises:
        DistNetworkError, DistStoreError: rank 0, or another rank, is not there within ``timeout``.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # else rank 0's own, as new as that is
        store = dist.PrefixStore(agree(store, rank, world_size, timeout), store)
    return store, rank, world_size


def agree(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that rank 0 makes. The others may first find that of a rank 0 that has ended, which does not answer."""
    own = uuid4().hex
    if rank == 0:
        store.set("start", own)
        for other in range(1, world_size):
            store.set(f"{own}/answer_{other}", store.get(f"{own}/call_{other}").decode())
        return own
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        name = store.get("start").decode()
        store.set(f"{name}/call_{rank}", own)
        answer = f"{name}/answer_{rank}"
        if store.check([answer]) and store.get(answer).decode() == own:
            return name
        time.sleep(_POLL_SECONDS)
    raise dist.DistStoreError(f"rank 0 did not answer rank {rank} within {timeout.total_seconds():g} s")
