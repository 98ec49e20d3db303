"""What is measured and how it is called: dense attention, our backends, and the blocks that ours read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from moba_train.attention import BACKENDS
from moba_train.attention.blocks import Blocks, cut
from moba_train.attention.gate import choose
from moba_train.attention.varlen import varlen_moba
from moba_train.bench.cases import Case
from moba_train.bench.check import FOREIGN, TOLERANCE, Judge, Results

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key, value -> out, packed

JUDGED = ("triton", "varlen", "reference")  # whose choices are known: others are held against the first that runs
DENSE = {  # fastest first; the first that runs a small case of the same kind is taken
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention-2": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}


def moba(name: str, case: Case, device: torch.device) -> Attend:
    """A backend on a case."""
    bounds, function = case.cu_seqlens(device), BACKENDS[name].function
    return lambda query, key, value: function(query, key, value, bounds, case.length, case.spec, case.scale)


def dense(case: Case, kernel: SDPBackend | None) -> Attend:
    """torch's dense causal attention, by one of its kernels; None leaves the choice to torch."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shape = (case.sequences, case.length, -1, case.head_dim)
        q, k, v = (x.view(shape).transpose(1, 2) for x in (query, key, value))
        keywords: dict[str, Any] = {"is_causal": True, "enable_gqa": case.heads > case.kv_heads}
        if kernel is None:
            out = scaled_dot_product_attention(q, k, v, **keywords)
        else:
            with sdpa_kernel(kernel):
                out = scaled_dot_product_attention(q, k, v, **keywords)
        return out.transpose(1, 2).reshape(query.shape)

    return attend


def fastest_dense(case: Case, device: torch.device) -> tuple[str, Attend]:
    """The name and the call of the dense attention to compare with."""
    if device.type == "cpu":
        return "torch SDPA", dense(case, None)
    small = Case("small", 1, 256, case.heads, case.kv_heads, 64, 1, case.head_dim, case.dtype)
    tensors = small.tensors(device)
    for name, kernel in DENSE.items():
        try:
            results(dense(small, kernel), tensors)
        except RuntimeError:  # torch's way to say that the kernel does not take such tensors
            continue
        return name, dense(case, kernel)
    raise AssertionError("the math kernel takes everything")


def results(attend: Attend, tensors: list[Tensor]) -> Results:
    """Output and gradients of one call on query, key, value and the output's gradient."""
    out = attend(*tensors[:3])
    return Results(out.detach(), *torch.autograd.grad(out, tensors[:3], tensors[3]))


def judge(name: str, case: Case, tensors: list[Tensor], found: Results) -> Judge:
    """Of a backend of ``JUDGED``: with the choices that it made, and the log-sum-exps where it has them."""
    query, key, value = (tensor.detach() for tensor in tensors[:3])
    blocks = cut(case.cu_seqlens(query.device), case.block_size, case.tokens)
    if name == "triton":
        choices, lse = _fused_choices(case, query, key, value, blocks)
    else:
        choices, lse = choose(query, key, blocks, case.spec), None
    if name == "varlen":
        with torch.no_grad():
            lse = varlen_moba(query, key, value, choices, blocks.bounds, case.block_size, case.scale)[1]
    return Judge(tensors, found, blocks, choices, case.block_size, case.scale, lse)


def judge_dense(case: Case, tensors: list[Tensor], found: Results) -> Judge:
    """Dense attention: every sequence is one block."""
    blocks = cut(case.cu_seqlens(tensors[0].device), case.length, case.tokens)
    choices = torch.empty(case.tokens, case.heads, 0, dtype=torch.int16, device=tensors[0].device)
    tolerance = FOREIGN * TOLERANCE[tensors[0].dtype]
    return Judge(tensors, found, blocks, choices, case.length, case.scale, tolerance=tolerance)


@torch.no_grad()
def _fused_choices(case: Case, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """(T, H, R) blocks that the kernels chose, -1 for none, and their (T, H) natural log-sum-exps."""
    from moba_train.attention.kernels import op

    top_k = min(case.top_k, (case.length - 1) // case.block_size + 1)
    parts = (blocks.bounds, blocks.first, blocks.of_token)
    named = op.choose(query, key, *parts, case.block_size, top_k)  # (K, T, G, R), counted from the segment's first
    lists = op.route(named, *parts)
    _, lse = op.attend(query, key, value, *parts, *lists, case.block_size, case.scale)  # (K, T * G), in base 2
    first = blocks.first[blocks.of_token].view(1, -1, 1, 1)
    choices = torch.where(named == torch.iinfo(named.dtype).max, -1, named.int() + first)
    lse = lse.view(case.kv_heads, case.tokens, -1) * torch.log(torch.tensor(2.0)).item()
    return choices.transpose(0, 1).flatten(1, 2), lse.transpose(0, 1).flatten(1)


def choice_bytes(case: Case) -> int:
    """Of one choice, as the kernels store it."""
    from moba_train.attention.kernels.select import choice_type

    return choice_type(case.tokens, case.block_size).itemsize
