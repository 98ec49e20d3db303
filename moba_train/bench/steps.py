"""The steps of the fused kernels: which kernels they are, what they must do at least, and how long that takes.

A step's limit is the longer of its floating-point operations at the rate of a large matrix product and its bytes, every
tensor read or written once, at the rate of a large copy. A call's limit is their sum: the steps run one after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moba_train.bench.cases import Case
from moba_train.bench.timing import Ceilings
from moba_train.cost import gate_scores, moba_keys

KERNELS = {  # step -> how the names of its kernels start
    "pool": ("_pool_kernel",),
    "select": ("_select_kernel", "select_hopper_"),
    "route": (
        "route_",
        "_rank_kernel",
        "_total_kernel",
        "_place_kernel",
        "_scatter_kernel",
        "_tile_lists_kernel",
        "_find_lists_kernel",
    ),
    "forward": ("routed_forward_", "resident_forward_"),
    "local + merge": ("merge_kernel", "merge_hopper_"),
    "backward: row dot": ("row_dot_kernel",),
    "backward: key, value": ("key_value_", "pad_lists_kernel"),
    "backward: query": ("routed_query_",),
    "backward: local + merge": ("merge_query_",),
}
OTHER = "other"  # kernels of no step: sums, fills, casts


@dataclass(frozen=True)
class Work:
    """What a step must do at least in one forward and backward call, and how much of that in the forward pass."""

    flops: float
    bytes: float
    forward_share: float

    def limit_ms(self, rates: Ceilings) -> float:
        return max(self.flops / rates.flops_per_ms, self.bytes / rates.bytes_per_ms)


def must_do(case: Case, choice_bytes: int) -> dict[str, Work]:
    """Of every step of ``KERNELS``, for 16-bit tensors.

    Args:
        choice_bytes: of one choice, 1, 2 or 4.
    """
    lengths = [case.length] * case.sequences
    block_size, dim, row = case.block_size, case.head_dim, 2 * case.head_dim
    own_pairs = moba_keys(lengths, block_size, 1) * case.heads
    pairs = moba_keys(lengths, block_size, case.top_k) * case.heads - own_pairs
    entries = pairs // block_size  # (query, chosen block)
    candidates = gate_scores(lengths, block_size) * case.heads * (case.top_k > 1)
    choices = case.tokens * case.heads * (case.top_k - 1) * choice_bytes
    queries, keys = case.tokens * case.heads * row, case.tokens * case.kv_heads * row
    one_kernel = block_size <= 128  # then dK, dV and dQ come from one
    return {
        "pool": Work(0, keys, 1),
        "select": Work(4 * dim * candidates, queries + choices, 1),  # a mean key is two bf16 terms: two products
        "route": Work(0, 2 * choices + 4 * entries, 1),
        "forward": Work(4 * dim * pairs, entries * (2 * row + 4) + 2 * keys, 1),
        "local + merge": Work(4 * dim * own_pairs, 2 * queries + 2 * keys + entries * (row + 4), 1),
        "backward: row dot": Work(0, 2 * queries, 0),
        "backward: key, value": Work(
            8 * dim * (pairs + own_pairs) + 2 * dim * pairs * one_kernel,
            entries * (2 * row + 32 + row * one_kernel) + 2 * queries + 4 * keys,
            0,
        ),
        "backward: query": Work(0, 0, 0) if one_kernel else Work(6 * dim * pairs, entries * 3 * row + 2 * keys, 0),
        "backward: local + merge": Work(6 * dim * own_pairs, 3 * queries + 2 * keys + entries * row, 0),
    }


def step_rows(work: Mapping[str, Work], times: Mapping[str, float], rates: Ceilings) -> list[dict[str, Any]]:
    """One row a step: its time, what it must do, and its limit; last the kernels of no step.

    Args:
        times: milliseconds by kernel name.
    """
    spent = dict.fromkeys((*KERNELS, OTHER), 0.0)
    for kernel, time in times.items():
        spent[next((step for step, names in KERNELS.items() if kernel.startswith(names)), OTHER)] += time
    rows = [
        {"step": step, "ms": spent[step], "limit_ms": needed.limit_ms(rates), **asdict(needed)}
        for step, needed in work.items()
    ]
    return [*rows, {"step": OTHER, "ms": spent[OTHER], "limit_ms": 0.0, **asdict(Work(0, 0, 0))}]


def limits_ms(work: Mapping[str, Work], rates: Ceilings) -> tuple[float, float]:
    """The least time of the forward pass, and of forward and backward."""
    limits = [(needed.limit_ms(rates), needed.forward_share) for needed in work.values()]
    return sum(limit * share for limit, share in limits), sum(limit for limit, _ in limits)
