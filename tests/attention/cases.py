"""Cases that the attention tests share."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from moba_train.attention import AttentionSpec
from moba_train.attention.backends import AttentionFunction
from moba_train.attention.blocks import Blocks

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]
# Largest error over the largest value: a backend rounds once or twice where the fp32 reference does not.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Case:
    """Segments and heads of one attention call; ``str`` is its test id."""

    name: str
    lengths: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 16
    top_k: int = 3

    def __str__(self) -> str:
        return self.name

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec("moba", self.block_size, self.top_k)

    def cu_seqlens(self, device: str = "cpu") -> Tensor:
        return torch.tensor([0, *self.lengths], device=device).cumsum(0).int()

    def tensors(self, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
        """query, key, value and the output's gradient."""
        generator = torch.Generator().manual_seed(seed)
        tokens = sum(self.lengths)
        return tuple(
            torch.randn(tokens, heads, self.head_dim, generator=generator).to(device, dtype)
            for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        )


CASES = [
    Case("odd_length", (203,)),
    Case("whole_blocks", (192,)),
    Case("several_documents", (64, 131, 7, 50)),
    Case("short_tails", (33, 49, 17, 65)),
    Case("one_token_documents", (1, 1, 70, 1, 1)),
    Case("empty_segments", (0, 40, 0, 0, 61, 0)),
    Case("many_short_documents", (5, 9, 1, 30, 5, 12, 3, 5, 22, 8)),
    Case("shorter_than_a_block", (11,)),
    Case("single_token", (1,)),
    Case("own_block_only", (150, 37), top_k=1),
    Case("covers_everything", (100, 60), top_k=8),
    Case("most_of_the_blocks", (203,), top_k=9),
    Case("one_kv_head", (140, 30), heads=6, kv_heads=1),
    Case("no_grouping", (140, 30), heads=3, kv_heads=3),
    Case("block_of_any_size", (157, 64), block_size=23),
    Case("block_of_64", (700,), block_size=64, top_k=4),
    Case("head_dim_64", (150,), head_dim=64),
    Case("head_dim_128", (150,), head_dim=128),
]


def attend(
    function: AttentionFunction, case: Case, spec: AttentionSpec, tensors: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """Output and gradients of one call."""
    query, key, value, grad_out = tensors
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value)]
    cu_seqlens = case.cu_seqlens(query.device.type)
    out = function(*inputs, cu_seqlens, max(case.lengths), spec, case.head_dim**-0.5)
    out.backward(grad_out)
    return {"out": out.detach(), **{f"grad_{n}": x.grad for n, x in zip("qkv", inputs, strict=True)}}


def graphs_of_any_documents(function: AttentionFunction, device: str, dtype: torch.dtype) -> int:
    """How many graphs torch.compile makes for rows of two, three and four documents: two, the first for two alone."""
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=graphs)
    for lengths in ((70, 41), (30, 60, 21), (50, 20, 21, 20)):
        case = Case("compile", lengths, 4, 2, 16, 16, 3)
        attend(compiled, case, case.spec, case.tensors(device, dtype))
    return graphs.frame_count


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, reference in expected.items():
        error = (found[name].to(reference) - reference).abs().max() / reference.abs().max().clamp(min=0.1)
        assert error <= tolerance, f"{name} is off by {error:.2e} of its largest value, above {tolerance:.0e}"


def exact_choices(query: Tensor, high: Tensor, low: Tensor, blocks: Blocks, choose: int) -> Tensor:
    """(K, T, G, choose) blocks, ascending, that each query (T, H, D) chooses by representatives high + low (K, N, D).
    Of equal scores the earlier block's counts, and those that are no numbers come last. -1: no block."""
    rows = query.double().unflatten(1, (len(high), -1))
    scores = sum(torch.einsum("tkgd,knd->ktgn", rows, part.double()) for part in (low, high))
    scores = torch.where(scores.isnan(), -1e38, scores).clamp(min=-1e38)
    first, own, index = (
        blocks.first[blocks.of_token],
        blocks.of_token,
        torch.arange(len(blocks.first), device=query.device),
    )
    allowed = (index >= first[:, None]) & (index < own[:, None])
    scores = torch.where(allowed[:, None], scores, -torch.inf)
    found = scores.sort(dim=-1, descending=True, stable=True).indices[..., :choose]
    chosen = torch.where(scores.gather(-1, found) > -torch.inf, found - first[:, None, None], -1)
    return chosen.sort(-1).values
