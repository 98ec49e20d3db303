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

# Scores that exist at one time: near a CPU's caches, enough to fill a GPU (4 and 256 MiB in fp32).
TILE_SCORES = {"cpu": 1 << 20, "cuda": 1 << 26}


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

    Works through the queries in tiles, so that never more than ``TILE_SCORES`` scores exist. Reads ``blocks`` back to
    the host.

    Args:
        query: (T, H, D).
        key: (T, K, D), after RoPE.
        blocks: of the segments, cut by ``spec.block_size``.
        spec: a ``moba`` spec.

    Returns:
        (T, H, top_k - 1) int16 (int32 with room for 32,768 blocks or more): indices into ``blocks``, best first, equal
        scores in block order, -1 where a query has fewer earlier blocks than that.
    """
    block_size, top_k = spec.moba
    tokens, heads, _ = query.shape
    choices = torch.full((tokens, heads, top_k - 1), -1, dtype=index_type(len(blocks.first)), device=query.device)
    if top_k == 1:
        return choices
    own, first = blocks.of_token.long(), blocks.first.long()
    oldest = first[own]  # (T,): the first block that a query may choose
    # What a tile's queries may choose from lies between its first query's oldest block and its last query's own.
    host_oldest, host_own = oldest.cpu(), own.cpu()
    with exact_matmul(query.device):
        means = representatives(key, blocks, block_size).permute(1, 2, 0)  # (K, D, N)
        tile = max(1, TILE_SCORES[query.device.type] // (heads * len(first)))
        for start in range(0, tokens, tile):
            stop = min(start + tile, tokens)
            low, high = int(host_oldest[start]), int(host_own[stop - 1])
            if low == high:
                continue
            scores = _scores(query[start:stop], means[:, :, low:high])
            block = torch.arange(low, high, device=query.device)
            forbidden = (block < oldest[start:stop, None]) | (block >= own[start:stop, None])
            scores.masked_fill_(forbidden, -torch.inf)
            for slot in range(min(top_k - 1, high - low)):
                best, at = scores.max(dim=-1, keepdim=True)  # the first of equal scores: the earlier block
                picked = torch.where(best > -torch.inf, at + low, -1)
                choices[start:stop, :, slot] = picked.squeeze(-1).t()
                scores.scatter_(-1, at, -torch.inf)
    return choices


def _scores(query: Tensor, means: Tensor) -> Tensor:
    """(H, T, N) scores of query (T, H, D) against means (K, D, N)."""
    tokens, heads, head_dim = query.shape
    grouped = query.transpose(0, 1).reshape(len(means), -1, head_dim)  # (K, G * T, D)
    return torch.bmm(grouped.to(means.dtype), means).view(heads, tokens, -1)


def index_type(room: int) -> torch.dtype:
    """Of indices into so many blocks, and -1."""
    return torch.int16 if room < 1 << 15 else torch.int32
