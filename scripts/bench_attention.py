"""How the cost of MoBA grows with length, against dense attention: python scripts/bench_attention.py

On a CPU: the `varlen` backend against torch's dense causal attention from 2K to 32K tokens, one document, forward and
forward + backward. No speed is printed unless output and gradients matched the reference at the smallest length, in
the same run. On a GPU: the fused kernels against cuDNN from 32K to 1M tokens, see bench_attention_cuda.py.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moba_train.attention import full_attention, moba_attention
from moba_train.cost import sparsity

LENGTHS = (2048, 4096, 8192, 16384, 32768)
TOLERANCE = 1e-5  # of the largest value, in fp32


@dataclass(frozen=True)
class Shape:
    """Heads and blocks of the layer that is measured."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    top_k: int

    def inputs(self, length: int) -> list[Tensor]:
        """query, key, value (requiring gradients) and the output's gradient."""
        generator = torch.Generator().manual_seed(0)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        tensors = [torch.randn(length, n, self.head_dim, generator=generator) for n in heads]
        return [tensor.requires_grad_(i < 3) for i, tensor in enumerate(tensors)]

    def moba(self, backend: str) -> Callable[..., Tensor]:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return moba_attention(query, key, value, block_size=self.block_size, top_k=self.top_k, backend=backend)

        return attend


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's own dense causal attention."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def check(name: str, found: Callable[..., Tensor], expected: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Stop the run where an output or gradient differs from the reference's."""
    results = []
    for attend in (found, expected):
        out = attend(*inputs[:3])
        results.append((out.detach(), *torch.autograd.grad(out, inputs[:3], inputs[3])))
    for what, got, wanted in zip(("output", "dQ", "dK", "dV"), *results, strict=True):
        error = float((got - wanted).abs().max() / wanted.abs().max())
        if not error <= TOLERANCE:
            raise SystemExit(f"{name}: {what} is off by {error:.1e} of its largest value; no speed is worth printing")


def seconds(attend: Callable[..., Tensor], inputs: list[Tensor], backward: bool) -> float:
    """Median time of a call, over about two seconds of calls after a first one."""

    def call() -> float:
        start = time.perf_counter()
        if backward:
            torch.autograd.grad(attend(*inputs[:3]), inputs[:3], inputs[3])
        else:
            with torch.no_grad():
                attend(*inputs[:3])
        return time.perf_counter() - start

    first = call()
    return statistics.median(call() for _ in range(min(9, max(1, int(2 / first)))))


def cpu_growth(shape: Shape) -> None:
    """Check, then print a row a length."""
    smallest = shape.inputs(LENGTHS[0])
    check("varlen", shape.moba("varlen"), shape.moba("reference"), smallest)
    check("dense", dense, lambda *tensors: full_attention(*tensors, backend="reference"), smallest)
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, fp32; {shape}")
    print(f"output and gradients of both match the reference to {TOLERANCE:.0e} at {LENGTHS[0]} tokens")
    print(f"{'tokens':>7} {'sparsity':>9} | {'forward, ms':^25} | {'forward + backward, ms':^25}")
    print(f"{'':17} | {'dense':>8} {'varlen':>8} {'ratio':>7} | {'dense':>8} {'varlen':>8} {'ratio':>7}")
    for length in LENGTHS:
        inputs = shape.inputs(length)
        cells = []
        for backward in (False, True):
            slow, fast = (seconds(attend, inputs, backward) for attend in (dense, shape.moba("varlen")))
            cells.append(f"{slow * 1e3:8.1f} {fast * 1e3:8.1f} {slow / fast:6.1f}x")
        print(f"{length:7} {sparsity(shape.block_size, shape.top_k, length):9.1%} | {' | '.join(cells)}", flush=True)


def main() -> None:
    if torch.cuda.is_available():
        from bench_attention_cuda import main as cuda_main

        return cuda_main()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("heads", 6), ("kv-heads", 2), ("head-dim", 32), ("block-size", 256), ("top-k", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    cpu_growth(Shape(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
