"""Ranks of a start find one another in a store that earlier starts have used."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from moba_train.meeting import agree


def start(store: dist.Store, late: int) -> str:
    def one(rank: int) -> str:
        if rank == late:
            time.sleep(0.5)
        return agree(store, rank, 3, timedelta(seconds=20))

    with ThreadPoolExecutor(3) as ranks:
        (name,) = set(ranks.map(one, range(3)))
    return name


def test_every_start_has_a_name_of_its_own() -> None:
    """Also where the others come first, and find the name that was left there."""
    store = dist.HashStore()
    assert len({start(store, late) for late in (0, 0, 1, 2)}) == 4


def test_a_rank_0_that_has_ended_does_not_answer() -> None:
    store = dist.HashStore()
    start(store, late=0)
    with pytest.raises(dist.DistStoreError, match=r"rank 0 did not answer rank 2 within 0\.5 s"):
        agree(store, 2, 3, timedelta(seconds=0.5))
