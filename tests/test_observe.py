"""Who is slow: the arithmetic and the words. The ranks themselves are in test_interruption.py."""

from __future__ import annotations

import time

import pytest
import torch

from moba_train import observe
from moba_train.observe import OwnTime, Peers, Stragglers, exchange
from moba_train.runtime import Runtime

ONE = Runtime(0, 1, 0, torch.device("cpu"))


def peers(*seconds: float) -> Peers:
    return Peers(list(seconds), [0.0] * len(seconds), [0.0] * len(seconds))


def stragglers(ranks: int) -> Stragglers:
    found = Stragglers(ONE)
    found._hosts, found._slow_steps = [f"node{rank}" for rank in range(ranks)], [0] * ranks
    return found


def test_own_time_leaves_the_rest_out() -> None:
    own = OwnTime(torch.device("cpu"))
    with own.on_host():
        time.sleep(0.05)
    time.sleep(0.2)
    with own.on_device():
        time.sleep(0.05)
    assert 0.1 <= own.take() < 0.2
    assert own.take() == 0


def test_the_spread_of_the_ranks() -> None:
    row = Peers([1.0, 4.0, 2.0], [5.0, 6.0, 9.0], [0.0, 15.0, 10.0]).as_row()
    assert row == {
        "perf/slowest_rank": 1,
        **{"perf/rank_seconds_min": 1.0, "perf/rank_seconds_median": 2.0, "perf/rank_seconds_max": 4.0},
        **{"perf/rank_memory_gb_min": 5.0, "perf/rank_memory_gb_median": 6.0, "perf/rank_memory_gb_max": 9.0},
    }
    assert peers(1.0).as_row() == {}
    assert exchange(ONE, 2.0, 3.0, 15) == Peers([2.0], [3.0], [15.0])
    assert Peers([1.0, 1.0], [0.0, 0.0], [0.0, 12.0]).signal == 12


def test_a_rank_that_stays_slow_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    found = stragglers(4)
    for _ in range(observe.PERSISTENT_STEPS + 20):
        found.note(peers(1.0, 1.1, 1.3, 1.0))
    (record,) = caplog.records
    assert "rank 2 on node2" in record.message and "10 steps" in record.message and "1.3 s" in record.message


@pytest.mark.parametrize(
    "steps",
    [
        [peers(1.0, 1.19)] * 40,
        [*[peers(1.0, 2.0)] * (observe.PERSISTENT_STEPS - 1), peers(1.0, 1.0)] * 4,
        [peers(1.0, 2.0), peers(2.0, 1.0)] * 20,
        [peers(1.0)] * 40,
    ],
    ids=["within the usual", "now and then", "in turn", "alone"],
)
def test_others_are_not(caplog: pytest.LogCaptureFixture, steps: list[Peers]) -> None:
    found = stragglers(len(steps[0].seconds))
    for step in steps:
        found.note(step)
    assert not caplog.records
