"""MoBA's definition in plain PyTorch: what every other backend must reproduce, output and gradients.

Slow and simple on purpose. Autograd derives the gradients; none flows through the choice of blocks.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from moba_train.attention.gate import exact_matmul
from moba_train.attention.spec import AttentionSpec


def reference(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, spec: AttentionSpec, scale: float
) -> Tensor:
    """Attention of every segment on its own, computed in fp32 (fp64 for fp64 inputs).

    Args:
        query: (T, H, D). Query head h reads key/value head h // (H / K).
        key: (T, K, D).
        value: (T, K, D).
        cu_seqlens: (S + 1,) int32 segment bounds, from 0 to T; equal neighbours are an empty segment.
        max_seqlen: tokens of the longest segment (not needed here; every backend has this signature).
        spec: what to attend to.
        scale: of the attention logits. The gate's scores are unscaled.

    Returns:
        (T, H, D) in query's type.
    """
    bounds = cu_seqlens.tolist()
    exact = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    with exact_matmul(query.device):
        q = query.to(exact).transpose(0, 1)  # (H, T, D)
        k = key.to(exact).transpose(0, 1).repeat_interleave(group, dim=0)
        v = value.to(exact).transpose(0, 1).repeat_interleave(group, dim=0)
        outputs = [
            _segment(q[:, start:stop], k[:, start:stop], v[:, start:stop], spec, scale)
            for start, stop in pairwise(bounds)
            if start < stop
        ]
    return torch.cat(outputs, dim=1).transpose(0, 1).to(query.dtype)


def _segment(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, scale: float) -> Tensor:
    """One segment of length L: q, k, v and the output are (H, L, D)."""
    length = q.shape[1]
    position = torch.arange(length, device=q.device)
    readable = position[:, None] >= position  # (L, L): causal
    if spec.kind == "moba":
        block_size, top_k = spec.moba
        block = position // block_size
        earlier = _earlier_blocks(q.detach(), k.detach(), block, block_size, top_k)  # (H, L, N)
        own = block[:, None] == block
        readable = readable & (own | earlier[:, :, block])  # (H, L, L)
    logits = (q @ k.transpose(1, 2) * scale).masked_fill(~readable, -torch.inf)
    return logits.softmax(dim=-1) @ v


def _earlier_blocks(q: Tensor, k: Tensor, block: Tensor, block_size: int, top_k: int) -> Tensor:
    """(H, L, N) bool: the ``top_k - 1`` blocks before a query's own whose mean key scores highest."""
    means = torch.stack([keys.mean(dim=1) for keys in k.split(block_size, dim=1)], dim=1)  # (H, N, D)
    before = torch.arange(means.shape[1], device=q.device) < block[:, None]  # (L, N)
    scores = (q @ means.transpose(1, 2)).masked_fill(~before, -torch.inf)
    # A stable sort keeps equal scores in block order: ties go to the earlier block.
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : top_k - 1]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & before
