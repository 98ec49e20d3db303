"""Check, then time: one case, every implementation."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moba_train.attention import BACKENDS
from moba_train.bench import steps
from moba_train.bench.cases import Case
from moba_train.bench.check import CheckFailed, Results
from moba_train.bench.compare import compare
from moba_train.bench.implementations import (
    JUDGED,
    Attend,
    choice_bytes,
    fastest_dense,
    judge,
    judge_dense,
    moba,
    results,
)
from moba_train.bench.timing import Ceilings, extra_memory, kernel_times, milliseconds


class DeviceLost(Exception):
    """After an error on the GPU nothing that it still says means anything."""


@dataclass(frozen=True)
class Column:
    """One implementation on one case. It has times only where ``checked`` says how its results were found right; else
    ``reason`` says why not, and ``failed`` whether that was a check.

    Attributes:
        times: milliseconds of forward, and of forward + backward.
        memory: extra memory as ``timing.extra_memory`` gives it; None on a CPU.
    """

    name: str
    checked: str = ""
    reason: str = ""
    failed: bool = False
    times: tuple[float, float] | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        assert self.times is None or self.checked, "nothing is timed that was not checked"


def measure(case: Case, names: Sequence[str], device: torch.device, rates: Ceilings | None) -> dict[str, Any]:
    """One row of the table, as it is written to the JSON file.

    Args:
        names: of the backends to measure; the first is the one whose limits are told.
        rates: of the machine; None where they are not measured.

    Raises:
        DeviceLost: the GPU failed under one of them.
    """
    tensors = case.tensors(device)
    # What the other implementations are held against, checked itself. Measured too, where it is one of those named.
    base = next(name for name in JUDGED if _refusal(name, tensors, case) is None)
    held, checked = _checked(base, case, tensors)
    columns = {name: _column(name, case, tensors, base, held, checked) for name in names}
    del held
    kernel, attend = fastest_dense(case, device)
    columns = {"dense": _dense_column(attend, case, tensors), **columns}
    row: dict[str, Any] = {**asdict(case), "sparsity": case.sparsity, "dense_kernel": kernel}
    row["columns"] = {name: asdict(column) for name, column in columns.items()}
    fused = columns.get("triton")
    if rates is not None and case.dtype != "fp32":
        work = steps.must_do(case, choice_bytes(case))
        row["limits_ms"] = steps.limits_ms(work, rates)
        if fused is not None and fused.times is not None:
            call = moba("triton", case, device)
            row["steps"] = steps.step_rows(work, kernel_times(lambda: results(call, tensors)), rates)
    return row


def _checked(base: str, case: Case, tensors: list[Tensor]) -> tuple[Results | None, Column]:
    """The results of a judged backend, and its column without times; no results where they are wrong."""
    found: list[Results] = []

    def check() -> Column:
        found.append(results(moba(base, case, tensors[0].device), tensors))
        return Column(base, checked=judge(base, case, tensors, found[0]).verdict())

    column = _guarded(base, check, must_run=True)
    return (found[0] if column.checked else None), column


def _column(name: str, case: Case, tensors: list[Tensor], base: str, held: Results | None, checked: Column) -> Column:
    """A backend: checked, then timed."""
    attend = moba(name, case, tensors[0].device)
    if name == base:
        return _timed(checked, attend, tensors)
    if reason := _refusal(name, tensors, case):
        return Column(name, reason=reason)
    if held is None:
        return Column(name, reason=f"there is nothing right to hold it against: {base} failed its own check")
    column = _guarded(name, lambda: Column(name, checked=compare(results(attend, tensors), held)))
    return _timed(column, attend, tensors)


def _dense_column(attend: Attend, case: Case, tensors: list[Tensor]) -> Column:
    def check() -> Column:
        return Column("dense", checked=judge_dense(case, tensors, results(attend, tensors)).verdict())

    # The long cases take seconds a call: the check's was the first, and cuDNN makes its plans there.
    return _timed(_guarded("dense", check, must_run=True), attend, tensors, warm=0)


def _refusal(name: str, tensors: list[Tensor], case: Case) -> str | None:
    return BACKENDS[name].refuses(tensors[0], tensors[1], case.spec)


def _timed(column: Column, attend: Attend, tensors: list[Tensor], warm: int = 2) -> Column:
    """The same with times and memory, if it was found right."""
    if not column.checked:
        return column
    device = tensors[0].device

    def forward() -> object:
        return attend(*tensors[:3]).detach()

    def both() -> object:
        return results(attend, tensors)

    def time() -> Column:
        # Dense attention's memory nobody asks for, and its calls are long.
        memory = extra_memory(both, tensors) if device.type == "cuda" and column.name != "dense" else None
        times = (milliseconds(forward, device, warm), milliseconds(both, device, warm))
        return replace(column, times=times, memory=memory)

    return _guarded(column.name, time, must_run=warm == 0)


def _guarded(name: str, make: Callable[[], Column], must_run: bool = False) -> Column:
    """What ``make`` returns, or a column that says what went wrong: other packages may raise anything.

    Args:
        must_run: an error that is no failed check counts as one.
    """
    with _device_kept(name):
        try:
            return make()
        except CheckFailed as error:
            return Column(name, reason=f"failed its check: {error}", failed=True)
        except Exception as error:
            told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            return Column(name, reason=told, failed=must_run)


@contextmanager
def _device_kept(name: str) -> Iterator[None]:
    """Afterwards the GPU's memory is free again, and it still works.

    Raises:
        DeviceLost: it does not.
    """
    try:
        yield
    finally:
        if torch.cuda.is_initialized():
            gc.collect()
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise DeviceLost(f"the GPU failed under {name} ({str(error).splitlines()[0]})") from None
