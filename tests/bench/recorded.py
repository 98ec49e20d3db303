"""A measurement as `moba-train bench` writes it, with figures of the first H200 run, for the table and the picture."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moba_train.bench.cases import CASES, Case
from moba_train.bench.measure import Column
from moba_train.bench.steps import KERNELS, limits_ms, must_do, step_rows
from moba_train.bench.timing import Ceilings

RATES = Ceilings(787e9, 4.27e9)
CHECKED = "gate 0.0e+00, out 3.1e-03, d_query 4.0e-03, d_key 4.1e-03, d_value 2.9e-03"
TIMES = {"c32k": ((14.7, 56.0), (3.02, 8.96)), "c64k": ((58.6, 223.0), (8.61, 20.7))}


def column(name: str, **given: Any) -> dict[str, Any]:
    return asdict(Column(name, **given))


def measurement() -> dict[str, Any]:
    return {
        "machine": {"command": "moba-train bench", "gpu": "NVIDIA H200"},
        "ceilings": asdict(RATES),
        "cases": [_row(CASES[name], *times) for name, times in TIMES.items()],
    }


def growth() -> dict[str, Any]:
    rows = []
    for length in (2048, 4096, 8192):
        case = Case(f"{length:,}", 1, length, 6, 2, 256, 3, 32, "fp32")
        columns = {"dense": length**2 / 1e5, "varlen": length / 1e2}
        made = {n: column(n, checked=CHECKED, times=(ms, 3 * ms)) for n, ms in columns.items()}
        rows.append({**asdict(case), "sparsity": case.sparsity, "dense_kernel": "torch SDPA", "columns": made})
    return {"machine": {"command": "moba-train bench"}, "ceilings": None, "cases": rows}


def _row(case: Case, dense: tuple[float, float], ours: tuple[float, float]) -> dict[str, Any]:
    work = must_do(case, 1)
    kernels = {names[0]: 1.0 + index for index, names in enumerate(KERNELS.values())}
    return {
        **asdict(case),
        "sparsity": case.sparsity,
        "dense_kernel": "cuDNN",
        "limits_ms": limits_ms(work, RATES),
        "steps": step_rows(work, {**kernels, "at::fill": 0.25}, RATES),
        "columns": {
            "dense": column("dense", checked=CHECKED, times=dense),
            "triton": column("triton", checked=CHECKED, times=ours, memory=0.42),
            "moonshot": column("moonshot", reason="failed its check: out differs in 40.0% of the rows", failed=True),
            "flash_moba": column("flash_moba", reason="the flash_moba package is not installed"),
        },
    }
