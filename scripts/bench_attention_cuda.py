"""The fused kernels against dense attention on a GPU; started by bench_attention.py where there is one.

Long contexts of bf16 random data, attention layer alone, gate and routing included. Dense is torch's attention with the
cuDNN backend. A case's speed is printed only if its output and gradients held (bench_attention_check.py). Under each
case stand the steps: time, and the share of it that the step's floating-point operations, or the bytes it must move,
would take at the rates of a large matrix product and a large copy, measured first.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch
import triton
from bench_attention_check import Judge
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from moba_train.attention.blocks import Blocks, cut
from moba_train.attention.kernels import op
from moba_train.attention.spec import AttentionSpec

SECONDS = 1.0  # of calls to take the median of, at most
KERNELS = {  # step -> the kernels that belong to it
    "pool": ("_pool_kernel",),
    "select": ("_select_kernel",),
    "route": ("_count_kernel", "_scatter_kernel"),
    "forward": ("routed_forward_kernel", "resident_forward_kernel"),
    "merge": ("merge_kernel",),
    "row dot": ("row_dot_kernel",),
    "key, value gradients": ("key_value_kernel", "pad_lists_kernel"),
    "query gradient": ("routed_query_kernel",),
    "merge of gradients": ("merge_query_kernel",),
}


@dataclass(frozen=True)
class Case:
    """Sequences, heads and blocks of one measurement, and the ratios to dense that are aimed at."""

    name: str
    sequences: int
    length: int
    heads: int
    kv_heads: int
    block_size: int
    top_k: int
    targets: tuple[tuple[float, float], tuple[float, float]]  # (forward, forward + backward), first and then
    head_dim: int = 128

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


CASES = [
    Case("c32k", 1, 32_768, 32, 8, 512, 3, ((4, 6), (8, 9))),
    Case("c64k", 2, 65_536, 16, 16, 128, 8, ((5, 7), (10, 12))),
    Case("c128k", 1, 131_072, 32, 8, 4096, 12, ((1.2, 1.15), (1.6, 1.4))),
    Case("c512k", 1, 524_288, 16, 16, 128, 8, ((30, 45), (60, 90))),
    Case("c1m", 1, 1_048_576, 4, 1, 4096, 12, ((8, 7), (12, 10))),
]


def milliseconds(call: Callable[[], object], warm: int = 2) -> float:
    """Median over calls that follow each other without a pause, as the layers of a model do."""
    for _ in range(warm):
        call()

    def marks(calls: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairwise(events)]

    (first,) = marks(1)
    more = min(50, int(SECONDS * 1e3 / first))
    return statistics.median(marks(more)) if more > 1 else first


def ceilings() -> tuple[float, float]:
    """(floating-point operations, bytes) a millisecond, of a large bf16 matrix product and a large copy."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * 8192**3 / milliseconds(lambda: a @ b), 2 * source.nbytes / milliseconds(lambda: target.copy_(source))


def must_do(case: Case, blocks: Blocks, choices: Tensor) -> dict[str, tuple[float, float]]:
    """(floating-point operations, bytes) of each step of forward and backward, every tensor read or written once."""
    own = blocks.of_token
    entries = int((choices != torch.iinfo(choices.dtype).max).sum())
    candidates = int((own - blocks.first[own]).sum()) * case.heads
    position = torch.arange(case.tokens, device=own.device) - blocks.bounds[own]
    own_pairs = int((position + 1).sum()) * case.heads
    pairs, dim, half = entries * case.block_size, case.head_dim, 2 * case.head_dim
    queries, keys, choice_bytes = case.tokens * case.heads * half, case.tokens * case.kv_heads * half, choices.nbytes
    fused = case.block_size <= 128  # then dK, dV and dQ come from one kernel
    return {
        "pool": (0, keys),
        "select": (4 * dim * candidates, queries + choice_bytes),
        "route": (0, 2 * (2 * choice_bytes + 4 * entries)),  # once in forward, once in backward
        "forward": (4 * dim * pairs, entries * (2 * half + 4) + 2 * keys),
        "merge": (4 * dim * own_pairs, 2 * queries + 2 * keys + entries * (half + 4)),
        "row dot": (0, 2 * queries),
        "key, value gradients": (
            8 * dim * (pairs + own_pairs) + 2 * dim * pairs * fused,
            entries * (2 * half + 32 + half * fused) + 2 * queries + 4 * keys,
        ),
        "query gradient": (0, 0) if fused else (6 * dim * pairs, entries * 3 * half + 2 * keys),
        "merge of gradients": (6 * dim * own_pairs, 3 * queries + 2 * keys + entries * half),
    }


def step_times(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of each step of one call, and of all other kernels."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
        call()
        torch.cuda.synchronize()
    times = dict.fromkeys((*KERNELS, "other"), 0.0)
    for event in trace.key_averages():
        step = next((s for s, names in KERNELS.items() if event.key.startswith(names)), "other")
        times[step] += event.self_device_time_total / 1e3
    return times


def measure(case: Case, rates: tuple[float, float]) -> dict:
    """Check, then measure one case."""
    torch.manual_seed(0)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    query, key, value, d_out = (
        torch.randn(case.tokens, n, case.head_dim, device="cuda", dtype=torch.bfloat16) for n in heads
    )
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    bounds = torch.arange(case.sequences + 1, dtype=torch.int32, device="cuda") * case.length
    spec, scale = AttentionSpec("moba", case.block_size, case.top_k), case.head_dim**-0.5

    def moba() -> Tensor:
        return op.triton_attention(query, key, value, bounds, case.length, spec, scale)

    def moba_gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(moba(), inputs, d_out)

    blocks = cut(bounds, case.block_size, case.tokens)
    parts = (blocks.bounds, blocks.first, blocks.of_token)
    with torch.no_grad():
        choices = op.choose(query, key, *parts, *spec.moba)
        _, lse = op.attend(query, key, value, *parts, choices, case.block_size, scale)
    out = moba()
    gradients = dict(zip(("d_query", "d_key", "d_value"), torch.autograd.grad(out, inputs, d_out), strict=True))
    with torch.no_grad():
        checked = Judge(
            blocks, choices, case.block_size, scale, query=query, key=key, value=value, d_out=d_out, out=out.detach(),
            lse=lse, **gradients,
        ).verdict()  # fmt: skip
    needs = must_do(case, blocks, choices)
    del out, gradients, lse, choices

    held = 2 * sum(tensor.nbytes for tensor in (*inputs, d_out))  # query, key, value, out and their gradients
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    moba_gradients()
    extra = torch.cuda.max_memory_allocated() - before - held // 2
    row = {
        **asdict(case),
        "checked": checked,
        "memory": extra / held,
        "moba": (milliseconds(moba), milliseconds(moba_gradients)),
        "steps": step_times(moba_gradients),
    }
    row["limits"] = {step: max(flops / rates[0], size / rates[1]) for step, (flops, size) in needs.items()}

    def dense_call(backward: bool) -> Callable[[], object]:
        shape = (case.sequences, case.length, -1, case.head_dim)
        q, k, v, d = (x.view(shape).transpose(1, 2) for x in (*inputs, d_out))

        def call() -> object:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                result = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=case.heads > case.kv_heads)
            return torch.autograd.grad(result, inputs, d) if backward else result

        return call

    # cuDNN makes its plans in the first call; the long cases are called no more than they must be
    both = milliseconds(dense_call(True), warm=1)
    row["dense"] = (milliseconds(dense_call(False), warm=0), both)
    row["ratio"] = tuple(d / m for d, m in zip(row["dense"], row["moba"], strict=True))
    return row


def show(row: dict) -> None:
    dense, moba, ratio = row["dense"], row["moba"], row["ratio"]
    aims = [f"{forward:g}x / {both:g}x" for forward, both in row["targets"]]
    print(
        f"{row['name']:>6} | {row['sequences']} x {row['length']:,} | {row['heads']}/{row['kv_heads']} | "
        f"{row['block_size']}, {row['top_k']} | {dense[0]:.4g} / {dense[1]:.4g} | {moba[0]:.4g} / {moba[1]:.4g} | "
        f"{ratio[0]:.3g}x / {ratio[1]:.3g}x | {aims[0]} | {aims[1]} | {row['memory']:.2f}x"
    )
    print(f"        checked, largest errors: {row['checked']}")
    for step, time in row["steps"].items():
        if time >= 0.01:
            limit = row["limits"].get(step, 0.0)
            print(f"        {step:<22} {time:9.3f} ms" + (f" {limit / time:6.0%} of its limit" if limit else ""))


def figure(rows: list[dict], path: Path) -> None:
    """Bars: how many times faster than dense, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(figsize=(7, 3.5))
    for at, label in ((0, "forward"), (1, "forward + backward")):
        bars = axes.bar([i + 0.4 * at for i in range(len(rows))], [row["ratio"][at] for row in rows], 0.38, label=label)
        axes.bar_label(bars, fmt="%.1fx", fontsize=8)
    axes.set_xticks([i + 0.2 for i in range(len(rows))])
    axes.set_xticklabels([f"{r['name']}\nblock {r['block_size']}, top-k {r['top_k']}" for r in rows], fontsize=8)
    axes.set_yscale("log")
    axes.set_ylim(1, 2 * max(max(row["ratio"]) for row in rows))
    axes.set_ylabel("times faster than dense cuDNN")
    axes.legend(frameon=False)
    drawing.tight_layout()
    drawing.savefig(path, dpi=160)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench_attention.py", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], default=None, metavar="NAME")
    parser.add_argument(
        "--output", type=Path, default=Path("bench_attention.json"), help="JSON; the figure lies beside"
    )
    options = parser.parse_args(arguments)
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    rates = ceilings()
    print(f"ceilings: matrix product {rates[0] / 1e9:.0f} TFLOP/s, copy {rates[1] / 1e9:.2f} TB/s")
    print(
        "case | B x N | H/KV | block, top-k | dense fwd / f+b ms | moba fwd / f+b ms | ratio | target | goal | memory"
    )
    rows = []
    for case in CASES:
        if options.cases is None or case.name in options.cases:
            rows.append(measure(case, rates))
            show(rows[-1])
            options.output.write_text(json.dumps({**about, "ceilings": rates, "cases": rows}, indent=1) + "\n")
            torch.cuda.empty_cache()
    figure(rows, options.output.with_suffix(".png"))
