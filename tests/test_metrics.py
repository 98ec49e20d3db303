"""Loss by position is exact; rates leave pauses out."""

import math
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from moba_train import metrics
from moba_train.cost import StepCost
from moba_train.metrics import PositionLoss, Throughput, memory_gb, peak_flops


def packed(segments: list[int], context_length: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Losses, target positions, valid and fills of rows made of ``segments``; the first token of each is no target."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.cat([torch.arange(n) for n in segments])
    fills = torch.cat([torch.full((n,), n == context_length) for n in segments])
    losses = torch.rand(len(positions), generator=generator) * 5
    return losses, positions, positions > 0, fills


def brute_force(parts, context_length: int, bin_size: int) -> dict[str, float]:
    """The definition, token by token."""
    bins: dict[str, list[float]] = {}
    for losses, positions, valid, fills in parts:
        for loss, position, ok, full in zip(*(x.tolist() for x in (losses, positions, valid, fills)), strict=True):
            if not ok:
                continue
            keys = ["x/loss", f"x/position_loss/{position // bin_size * bin_size:06d}"]
            if full and position >= context_length - bin_size:
                keys.append("x/trailing_loss")
            for key in keys:
                bins.setdefault(key, []).append(loss)
    return {key: math.fsum(values) / len(values) for key, values in bins.items()}


@given(
    context_length=st.integers(2, 40),
    bin_size=st.integers(1, 50),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_definition_for_any_packing(context_length, bin_size, data):
    rows = data.draw(st.lists(st.lists(st.integers(1, context_length), min_size=1, max_size=4), min_size=1, max_size=3))
    parts = [packed([*row, context_length], context_length, seed) for seed, row in enumerate(rows)]
    metric = PositionLoss(context_length, bin_size)
    for part in parts:
        metric.add(*part)
    assert metric.as_row("x", curve=True) == pytest.approx(brute_force(parts, context_length, bin_size), rel=1e-12)


def test_micro_batches_and_padding_do_not_matter():
    losses, positions, valid, fills = packed([7, 16, 9], 16)
    whole, parts = PositionLoss(16, 5), PositionLoss(16, 5)
    whole.add(losses, positions, valid, fills)
    for piece in (slice(0, 11), slice(11, 32)):
        parts.add(losses[piece], positions[piece], valid[piece], fills[piece])
    nothing = torch.zeros(6, dtype=torch.bool)
    # What padding holds is never looked at: NaN losses, positions beyond the context.
    parts.add(torch.full((6,), math.nan), torch.full((6,), 10**6), nothing, ~nothing)
    assert parts.as_row("train", True) == whole.as_row("train", True)


def test_short_last_bin_and_trailing_of_full_length():
    """Context 10 in bins of 4: bins 0-3, 4-7 and the short 8-9, while trailing covers 6-9."""
    metric = PositionLoss(10, 4)
    position = torch.arange(10)
    everything = torch.ones(10, dtype=torch.bool)
    metric.add(position.float(), position, everything, everything)
    assert metric.as_row("eval", True) == {
        "eval/loss": 4.5,
        "eval/trailing_loss": 7.5,
        "eval/position_loss/000000": 1.5,
        "eval/position_loss/000004": 5.5,
        "eval/position_loss/000008": 8.5,
    }


def test_trailing_needs_a_full_context():
    metric = PositionLoss(16, 4)
    metric.add(*packed([15, 1], 16))
    assert set(metric.as_row("train", False)) == {"train/loss"}
    metric.add(*packed([16], 16))
    assert set(metric.as_row("train", False)) == {"train/loss", "train/trailing_loss"}


def test_reset_and_empty():
    metric = PositionLoss(16, 4)
    assert metric.as_row("train", True) == {}
    metric.add(*packed([16], 16))
    metric.reset()
    assert metric.as_row("train", True) == {}


def test_long_contexts_count_exactly():
    metric = PositionLoss(1 << 20, 2048)
    metric.add(*packed([1 << 20], 1 << 20))
    row = metric.as_row("eval", True)
    assert sum(key.startswith("eval/position_loss/") for key in row) == 512
    assert row["eval/trailing_loss"] == row["eval/position_loss/1046528"]


def test_gradients_are_not_kept():
    metric = PositionLoss(4, 2)
    losses = torch.ones(4, requires_grad=True)
    metric.add(losses * 2, torch.arange(4), torch.ones(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool))
    assert metric.as_row("x", False) == {"x/loss": 2.0, "x/trailing_loss": 2.0}


def test_all_reduce_is_one_call(monkeypatch):
    """Two ranks that hold the same tokens: sums and counts double, means stay."""
    metric = PositionLoss(16, 4)
    metric.add(*packed([16, 5], 16))
    before = metric.as_row("x", True)
    metric.all_reduce()  # in a single process, without a group
    assert metric.as_row("x", True) == before
    calls = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: calls.append(tensor.shape) or tensor.mul_(2))
    metric.all_reduce()
    assert calls == [(2, 5)]
    assert metric.as_row("x", True) == before


def _two_ranks(rank: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    parts = [packed([16, 3], 16, 0), packed([9], 16, 1)]
    metric = PositionLoss(16, 4)
    metric.add(*parts[rank])
    metric.all_reduce()
    assert metric.as_row("x", True) == pytest.approx(brute_force(parts, 16, 4), rel=1e-12)
    dist.destroy_process_group()


@pytest.mark.distributed
def test_all_reduce_over_two_processes():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_two_ranks, args=(port,), nprocs=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_adding_on_cuda_waits_for_nothing_and_equals_the_cpu():
    part = packed([50, 64, 14], 64)
    on_cpu, on_cuda = PositionLoss(64, 10), PositionLoss(64, 10, "cuda")
    on_cpu.add(*part)
    moved = [tensor.cuda() for tensor in part]
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_cuda.add(*moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert on_cuda.as_row("x", True) == pytest.approx(on_cpu.as_row("x", True), rel=1e-12)
    assert 0 < memory_gb("cuda") < 1000 and peak_flops("cuda", torch.bfloat16) > 1e12


@pytest.mark.parametrize(("length", "size", "name"), [(0, 4, "context_length=0"), (8, 0, "bin_size=0")])
def test_refuses_empty_bins(length, size, name):
    with pytest.raises(ValueError, match=name):
        PositionLoss(length, size)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_throughput_leaves_pauses_out_and_forgets_old_steps():
    clock = Clock()
    meter = Throughput(peak_flops=100.0, window=2, clock=clock)
    assert meter.eta_seconds(10) is None
    for seconds in (50.0, 2.0, 2.0):  # the slow first step leaves the window
        clock.now += seconds
        meter.step(400, StepCost(model_flops=80.0, hardware_flops=120.0))
        with meter.pause():
            clock.now += 1000.0
    assert meter.as_row() == {
        "perf/tokens_per_second": 200.0,
        "perf/model_flop_utilization": 0.4,
        "perf/hardware_flop_utilization": 0.6,
    }
    assert meter.eta_seconds(1000) == 5.0
    assert (meter.tokens, meter.seconds) == (1200, 54.0)


def test_restart_forgets_another_stages_speed():
    clock = Clock()
    meter = Throughput(clock=clock)
    clock.now += 1.0
    meter.step(1000)
    clock.now += 30.0  # entering the stage
    meter.restart()
    assert meter.eta_seconds(10) is None
    clock.now += 1.0
    meter.step(100)
    assert meter.tokens_per_second == 100.0
    assert (meter.tokens, meter.seconds) == (1100, 2.0)


def test_throughput_without_a_peak_says_nothing_of_utilisation():
    clock = Clock()
    meter = Throughput(clock=clock)
    clock.now += 1.0
    meter.step(8)
    assert meter.as_row() == {"perf/tokens_per_second": 8.0}


def test_memory_and_measured_peak():
    assert 0.05 < memory_gb("cpu") < 1000
    assert 1e8 < peak_flops("cpu", torch.float32) < 1e15


def test_a_peak_is_measured_by_the_fastest_product(monkeypatch):
    """Two operations for each of 1,024 ** 3 multiplications; the budget ends the trials."""
    ticks = iter([0.0, 0.0, 0.4, 0.4, 1.0, 1.2])  # the start, a trial of 0.4 s, a look at the clock, one of 0.2 s
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(ticks, 9.0))
    assert metrics._measured_matmul_flops(torch.device("cpu"), torch.float32, 0.5) == pytest.approx(2 * 1024**3 / 0.2)


def test_a_gpus_peak_is_the_data_sheets_in_bf16_and_measured_else(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[0])
    monkeypatch.setattr(metrics, "_measured_matmul_flops", lambda device, dtype: 7.0)
    names = ["NVIDIA H200"]
    assert peak_flops("cuda", torch.bfloat16) == 989.4e12
    assert peak_flops("cuda", torch.float32) == 7.0
    names = ["of tomorrow"]
    assert peak_flops("cuda", torch.bfloat16) == 7.0


def test_memory_is_in_units_of_1e9_bytes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3_000_000_000)
    monkeypatch.setattr(metrics.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=2_000_000))
    monkeypatch.setattr(metrics.sys, "platform", "linux")
    assert (memory_gb("cuda"), memory_gb("cpu")) == (3.0, 2.048)


def test_a_cpus_peak_is_that_of_all_its_threads_measured_with_one(monkeypatch):
    """Together they would wait for one whose core another process has."""
    measured: list[int] = []
    monkeypatch.setattr(metrics, "_measured_matmul_flops", lambda *_: measured.append(torch.get_num_threads()) or 5e9)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert peak_flops("cpu", torch.float32) == 15e9
        assert measured == [1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
