"""The arithmetic of the steps against counts of real choices, and the table of kernels against the kernels."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from bench.recorded import RATES
from moba_train import attention
from moba_train.attention.blocks import cut
from moba_train.attention.gate import choose
from moba_train.bench.cases import CASES, Case
from moba_train.bench.steps import KERNELS, limits_ms, must_do, step_rows


def kernels() -> set[str]:
    """Every function that the kernels' files launch: those of Triton's whose names end so."""
    found = set()
    for file in (Path(attention.__file__).parent / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("kernel"):
                assert any("jit" in ast.unparse(d) for d in node.decorator_list), node.name
                found.add(node.name)
    return found


def test_every_kernel_belongs_to_one_step() -> None:
    for kernel in kernels():
        steps = [step for step, names in KERNELS.items() if kernel.startswith(names)]
        assert len(steps) == 1, f"{kernel} belongs to {steps}: mend KERNELS and must_do in moba_train/bench/steps.py"
    named = {name for names in KERNELS.values() for name in names}
    assert {name for name in named if not any(kernel.startswith(name) for kernel in kernels())} == set()


@pytest.mark.parametrize("block_size", [16, 256])
def test_work_is_counted_from_what_is_really_chosen(block_size: int) -> None:
    case = Case("count", 2, 700, 4, 2, block_size, 3, 32, "fp32")
    import torch

    query, key, _, _ = case.tensors(torch.device("cpu"))
    blocks = cut(case.cu_seqlens(query.device), block_size, case.tokens)
    choices = choose(query.detach(), key.detach(), blocks, case.spec)
    entries = int((choices >= 0).sum())
    own = blocks.of_token
    position = torch.arange(case.tokens) - blocks.bounds[own]
    own_pairs = int((position + 1).sum()) * case.heads
    candidates = int((own - blocks.first[own]).sum()) * case.heads
    work = must_do(case, 2)
    assert work["forward"].flops == 4 * 32 * entries * block_size
    assert work["local + merge"].flops == 4 * 32 * own_pairs
    assert work["select"].flops == 4 * 32 * candidates
    assert work["route"].bytes == 2 * 2 * choices.numel() + 4 * entries
    assert work["pool"].bytes == 2 * key.numel()
    together = sum(step.flops for name, step in work.items() if name.startswith("backward"))
    dq_apart = block_size > 128  # scores and their gradient are then formed twice
    assert together == (14 if dq_apart else 10) * 32 * entries * block_size + 14 * 32 * own_pairs


def test_no_choices_no_gate() -> None:
    work = must_do(Case("own", 1, 700, 4, 2, 64, 1), 1)
    assert work["select"].flops == work["forward"].flops == 0


def test_times_go_to_their_steps() -> None:
    work = must_do(CASES["c32k"], 1)
    times = {
        "_rank_kernel": 1.0,
        "route_fill_hopper_kernel": 2.0,
        "merge_kernel": 1.0,
        "merge_hopper_kernel": 2.0,
        "merge_query_hopper_kernel": 4.0,
        "Memset": 0.5,
    }
    rows = {row["step"]: row for row in step_rows(work, times, RATES)}
    assert rows["route"]["ms"] == 3 and rows["local + merge"]["ms"] == 3 and rows["backward: local + merge"]["ms"] == 4
    assert rows["other"]["ms"] == 0.5 and rows["other"]["limit_ms"] == 0
    assert sum(row["ms"] for row in rows.values()) == sum(times.values())


def test_limits_are_near_those_of_the_plan() -> None:
    """The plan's, from the dense kernel's rate and perfect overlap, are 1.1 / 4.6 ms; steps one after another take more
    bytes and, at the higher rate of a plain matrix product, fewer milliseconds of arithmetic."""
    forward, both = limits_ms(must_do(CASES["c32k"], 1), RATES)
    assert 0.8 < forward < 2.5 and 3 < both < 7 and forward < both
    assert RATES.flops_per_ms * both > 5 * must_do(CASES["c32k"], 1)["forward"].flops / 4
