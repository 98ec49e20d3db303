"""What a layer attends to, and what an attention call accepts.

Shape letters used in this package: T tokens, S segments, H query heads, K key/value heads, G = H / K query heads that
share a key/value head, D head_dim, B block_size, N blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

KINDS = ("full", "moba")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention: ``full`` (dense causal) or ``moba`` (Mixture of Block Attention).

    Args:
        kind: ``"full"`` or ``"moba"``.
        block_size: tokens of a block, at least 1; None for ``full``.
        top_k: blocks that a query reads, its own included, at least 1; None for ``full``.

    Raises:
        ValueError: an unknown kind, or sizes that do not belong to it.
    """

    kind: str
    block_size: int | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: unknown attention {self.kind!r}; choose from {', '.join(KINDS)}")
        for name, size in (("block_size", self.block_size), ("top_k", self.top_k)):
            if self.kind == "full" and size is not None:
                raise ValueError(f"{name} is {size!r} with kind full, which has no blocks; leave it out")
            if self.kind == "moba" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ValueError(f"{name} is {size!r}; give an integer of at least 1")

    @property
    def moba(self) -> tuple[int, int]:
        """(block_size, top_k) of a ``moba`` spec."""
        assert self.block_size is not None and self.top_k is not None, "only a moba spec has blocks"
        return self.block_size, self.top_k


def check_inputs(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> None:
    """Refuse tensors whose shapes, types or devices do not fit together. Reads no tensor's values.

    Raises:
        ValueError: names the argument and both values.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value), ("cu_seqlens", cu_seqlens)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; give a tensor")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; give (tokens, heads, head_dim)")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}; give bfloat16, float16, float32 or float64")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype} and query {query.dtype}; give all three the same")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device} and query on {query.device}; move all to one device")
    if value.shape != key.shape:
        raise ValueError(f"value has shape {tuple(value.shape)} and key {tuple(key.shape)}; give both the same")
    if min(query.shape) < 1:
        raise ValueError(f"query has shape {tuple(query.shape)}; give at least one token, head and dimension")
    if (key.shape[0], key.shape[2]) != (query.shape[0], query.shape[2]):
        raise ValueError(
            f"key has shape {tuple(key.shape)} and query {tuple(query.shape)}; tokens and head_dim must be the same"
        )
    if key.shape[1] < 1 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"key has {key.shape[1]} heads and query {query.shape[1]}; query heads must be a multiple of key heads"
        )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; give (segments + 1,)")
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens has dtype {cu_seqlens.dtype}; give torch.int32")
    if cu_seqlens.device != query.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} and query on {query.device}; move it there")


def check_scale(scale: float) -> None:
    """
    Raises:
        ValueError: the logits' scale is not a finite number above 0.
    """
    if not 0 < scale < math.inf:  # NaN is refused too
        raise ValueError(f"scale is {scale}; give a finite number above 0, or None for head_dim ** -0.5")


def check_bounds(cu_seqlens: Tensor, tokens: int) -> int:
    """Refuse segment bounds that do not cover ``tokens``; return the longest segment's length.

    Reads the bounds on the host: one device-to-host copy on CUDA.

    Raises:
        ValueError: names the bound that is wrong and its value.
    """
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"cu_seqlens starts at {bounds[0]}; it must start at 0")
    if bounds[-1] != tokens:
        raise ValueError(f"cu_seqlens ends at {bounds[-1]} and query has {tokens} tokens; they must be equal")
    lengths = [after - before for before, after in pairwise(bounds)]
    if min(lengths) < 0:
        at = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(
            f"cu_seqlens falls from {bounds[at]} to {bounds[at + 1]} at index {at + 1}; it must never descend"
        )
    return max(lengths)
