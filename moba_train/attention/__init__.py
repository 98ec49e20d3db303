"""MoBA attention over packed documents, with exchangeable backends. Depends on torch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from moba_train.attention.backends import BACKENDS, resolve
from moba_train.attention.spec import AttentionSpec, check_bounds, check_inputs, check_scale

__all__ = ["BACKENDS", "AttentionSpec", "full_attention", "moba_attention", "resolve"]


def moba_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int,
    top_k: int,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mixture of Block Attention (arXiv 2502.13189): each query reads its own block and the best earlier ones.

    Segments are cut into blocks of ``block_size`` tokens from their start. A query reads its own block causally and,
    of the blocks before it in its segment, the ``top_k - 1`` whose mean key has the largest dot product with it, ties
    to the earlier block; each query head chooses for itself. One softmax runs over all keys read. Differentiable in
    query, key and value, once and in reverse; no gradient flows through the choice. ``reference`` alone has
    forward-mode and second derivatives, and those of ``torch.func``.

    Args:
        query: (tokens, heads, head_dim), after RoPE.
        key: (tokens, kv_heads, head_dim), after RoPE; heads must be a multiple of kv_heads, and query head h reads
            key/value head h // (heads // kv_heads).
        value: like key.
        block_size: tokens of a block.
        top_k: blocks that a query reads, its own included: 1 is the own block alone, and with
            ``top_k * block_size >= length`` of the longest segment the result is exactly dense causal attention.
        cu_seqlens: (segments + 1,) int32, on query's device: segment i is the tokens
            ``cu_seqlens[i]:cu_seqlens[i + 1]``; equal neighbours are an empty segment. None: one segment.
        scale: of the attention logits, above 0; None is head_dim ** -0.5.
        backend: a key of ``BACKENDS``, or ``auto``.

    Returns:
        (tokens, heads, head_dim) in query's type.

    Raises:
        ValueError: tensors, bounds, sizes, scale or a backend that do not fit; the message names what and which values.
    """
    spec = AttentionSpec("moba", block_size, top_k)
    return _attend(query, key, value, cu_seqlens, spec, scale, backend)


def full_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Dense causal attention within each segment. Arguments, result and errors as in ``moba_attention``."""
    return _attend(query, key, value, cu_seqlens, AttentionSpec("full"), scale, backend)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None,
    spec: AttentionSpec,
    scale: float | None,
    backend: str,
) -> Tensor:
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, query.shape[0]], dtype=torch.int32, device=query.device)
    check_inputs(query, key, value, cu_seqlens)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    check_scale(scale)
    max_seqlen = check_bounds(cu_seqlens, query.shape[0])
    function = resolve(backend, query, key, spec)
    return function(query, key, value, cu_seqlens, max_seqlen, spec, scale)
