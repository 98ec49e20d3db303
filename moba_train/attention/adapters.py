"""Other MoBA packages behind our signature, for those who have them and want to compare: ``auto`` never takes one.

flash_moba  FlashMoBA (arXiv 2511.11571), https://github.com/mit-han-lab/flash-moba
moonshot    the paper's own code, https://github.com/MoonshotAI/MoBA (package ``moba``, which needs flash-attn)

Both count a query's own block in top_k, as we do, and both fix the logits' scale to head_dim ** -0.5. What MoonshotAI's
does to GQA (it wants key and value of every query head) is done here.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from moba_train.attention.spec import AttentionSpec

LARGEST_FLASH_TOP_K = 64
FLASH_BLOCK_UNIT = 64


def flash_moba(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, spec: AttentionSpec, scale: float
) -> Tensor:
    """``flash_moba_varlen_func``. Arguments and result as in ``reference``; ValueError for another scale."""
    from flash_moba import flash_moba_varlen_func

    _only_default_scale("flash_moba", query, scale)
    block_size, top_k = spec.moba
    bounds = cu_seqlens.unique_consecutive()
    return flash_moba_varlen_func(
        query, key, value, bounds, bounds, max_seqlen, max_seqlen, block_size, top_k, causal=True
    )


def moonshot(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, spec: AttentionSpec, scale: float
) -> Tensor:
    """``moba_attn_varlen``. Arguments and result as in ``reference``; ValueError for another scale."""
    from moba.moba_efficient import moba_attn_varlen

    _only_default_scale("moonshot", query, scale)
    block_size, top_k = spec.moba
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    return moba_attn_varlen(query, key, value, cu_seqlens.unique_consecutive(), max_seqlen, block_size, top_k)


def flash_moba_refuses(query: Tensor, key: Tensor, spec: AttentionSpec) -> str | None:
    """Why FlashMoBA cannot serve these tensors; None if it can."""
    reason = _refuses("flash_moba", query, spec)
    if reason is not None:
        return reason
    block_size, top_k = spec.moba
    if block_size % FLASH_BLOCK_UNIT:
        return f"block_size {block_size} is not a multiple of {FLASH_BLOCK_UNIT}"
    if top_k > LARGEST_FLASH_TOP_K:
        return f"top_k {top_k} is above {LARGEST_FLASH_TOP_K}"
    return None


def moonshot_refuses(query: Tensor, key: Tensor, spec: AttentionSpec) -> str | None:
    """Why MoonshotAI's code cannot serve these tensors; None if it can."""
    reason = _refuses("moba", query, spec)
    if reason is None and spec.moba[1] == 1:
        return "with top_k 1 it attends densely"
    return reason


def _refuses(package: str, query: Tensor, spec: AttentionSpec) -> str | None:
    if find_spec(package) is None:
        return f"the {package} package is not installed"
    if spec.kind != "moba":
        return f"it computes moba, not {spec.kind}"
    if query.device.type != "cuda":
        return f"it needs a CUDA device, and query is on {query.device}"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not {query.dtype}"
    return None


def _only_default_scale(name: str, query: Tensor, scale: float) -> None:
    if abs(scale - query.shape[-1] ** -0.5) > 1e-6:
        raise ValueError(f"scale is {scale}; {name} knows only head_dim ** -0.5 = {query.shape[-1] ** -0.5:.6g}")
