"""The gate: which earlier blocks each query reads.

A block is represented by the mean of its keys (after RoPE), a query scores it by their dot product, and the query's
head takes the ``top_k - 1`` best of its segment's earlier blocks (MoBA, arXiv 2502.13189, section 2.2). All in fp32,
whatever the inputs' type and whatever autocast or TF32 settings surround the call: a rounded score picks another block.
No gradient flows through the choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moba_train.attention.blocks import Blocks
from moba_train.attention.spec import AttentionSpec

TILE_SCORES = 1 << 22  # scores that exist at one time: 16 MiB in fp32


@contextmanager
def exact_matmul(device: torch.device) -> Iterator[None]:
    """Matrix products in the type of their operands: no autocast, no TF32, no bf16 passes."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def representatives(key: Tensor, blocks: Blocks, block_size: int) -> Tensor:
    """Mean key of every full-size block, (N, K, D) in fp32 (fp64 for fp64 keys).

    A short block is nobody's earlier block; its entry stays 0.
    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    means = torch.zeros(len(blocks.first), *key.shape[1:], dtype=dtype, device=key.device)
    full = (blocks.bounds.diff() == block_size).nonzero().squeeze(1)
    tokens = blocks.bounds[full].long()[:, None] + torch.arange(block_size, device=key.device)
    means[full] = key[tokens].mean(1, dtype=dtype)
    return means


@torch.no_grad()
def choose(query: Tensor, key: Tensor, blocks: Blocks, spec: AttentionSpec) -> Tensor:
    """Choose the earlier blocks that each query reads.

    Works through the queries in tiles, so that never more than ``TILE_SCORES`` scores exist.

    Args:
        query: (T, H, D).
        key: (T, K, D), after RoPE.
        blocks: of the segments, cut by ``spec.block_size``.
        spec: a ``moba`` spec.

    Returns:
        (T, H, top_k - 1) int16 (int32 from 32,768 blocks on): indices into ``blocks``, best first, equal scores in
        block order, -1 where a query has fewer earlier blocks than that.
    """
    block_size, top_k = spec.moba
    tokens, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    slots, count = top_k - 1, len(blocks.first)
    choices = torch.full(
        (tokens, heads, slots), -1, dtype=torch.int16 if count < 1 << 15 else torch.int32, device=query.device
    )
    if slots == 0:
        return choices
    with exact_matmul(query.device):
        means = representatives(key, blocks, block_size).permute(1, 2, 0)  # (K, D, N)
        own, first = blocks.of_token.cpu(), blocks.first.cpu()
        tile = max(1, TILE_SCORES // (heads * count))
        for start in range(0, tokens, tile):
            stop = min(start + tile, tokens)
            low, high = int(first[own[start]]), int(own[stop - 1])  # all that this tile's queries may choose from
            if low == high:
                continue
            grouped = query[start:stop].reshape(stop - start, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
            scores = (grouped.reshape(kv_heads, -1, head_dim).to(means.dtype) @ means[:, :, low:high]).view(
                heads, stop - start, high - low
            )
            block = torch.arange(low, high, device=query.device)
            mine = blocks.of_token[start:stop]
            allowed = (block >= blocks.first[mine][:, None]) & (block < mine[:, None])
            best, order = scores.masked_fill_(~allowed, -torch.inf).sort(dim=-1, descending=True, stable=True)
            best, order = best[..., :slots], order[..., :slots]
            picked = torch.where(best > -torch.inf, order + low, -1)
            choices[start:stop, :, : picked.shape[-1]] = picked.transpose(0, 1).to(choices.dtype)
    return choices
