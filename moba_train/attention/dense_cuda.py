"""The dense passes of ``varlen`` on CUDA, on FlashAttention-2: the flash-attn package if installed, else torch's own.

Full attention of equally long segments goes to cuDNN. Either FlashAttention takes packed sequences of any length with
grouped heads, and gives the log-sum-exp as (H, T) in fp32. Routed rows of one key/value head are packed by block, so
that every block is a sequence of its own; a block that nobody chose is a sequence without queries. All offsets stay on
the device; only the longest list of each head is read back.
"""

from __future__ import annotations

from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from moba_train.attention.keeping import keep_operator
from moba_train.attention.routing import Routes


def tile_rows(block_size: int) -> int:
    """Lists need no tiles here: sequences have any length."""
    return 1


@cache
def _flash_attn() -> Any:
    """flash-attn's interface, or None where it is not installed."""
    return import_module("flash_attn.flash_attn_interface") if find_spec("flash_attn") else None


def _forward(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, longest: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences with bounds ``queries`` and ``keys``: out, and log-sum-exp (H, T).

    Sequences whose bounds are the same tensor are causal.
    """
    flash_attn, causal = _flash_attn(), queries is keys
    # Of one query a sequence FlashAttention-2 would make as many as there are query heads for a kv head, by a reshape
    # that fails where a sequence is empty.
    longest = max(longest[0], 2), longest[1]
    if flash_attn:
        out, lse, _, _ = flash_attn._flash_attn_varlen_forward(
            query, key, value, queries, keys, *longest, dropout_p=0.0, softmax_scale=scale, causal=causal
        )
    else:
        out, lse, _, _, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, queries, keys, *longest, 0.0, causal, False, scale=scale
        )
    return out, lse


def _backward(
    tensors: tuple[Tensor, ...], queries: Tensor, keys: Tensor, longest: tuple[int, int], scale: float
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value; ``tensors`` are grad_out, query, key, value, out, log-sum-exp (H, T)."""
    flash_attn, causal = _flash_attn(), queries is keys
    if flash_attn:
        gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors[1:4])
        flash_attn._flash_attn_varlen_backward(
            *tensors,
            *gradients,
            queries,
            keys,
            *longest,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=False,
        )
        return gradients
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=queries.device)
    return torch.ops.aten._flash_attention_backward(
        *tensors, queries, keys, *longest, 0.0, causal, no_dropout, no_dropout, scale=scale
    )


def whole_rows(query: Tensor, key: Tensor, value: Tensor, rows: int, scale: float) -> Tensor:
    """Dense causal attention of ``rows`` equally long segments, shapes as in ``reference``: cuDNN's kernel, the fastest
    on recent GPUs but without packed bounds, and FlashAttention-2 where cuDNN refuses."""
    q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (query, key, value))
    fastest = sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True)
    with fastest, keep_operator("aten::_scaled_dot_product"):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def causal_forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Dense causal attention within each span; arguments and results as in ``dense_cpu``."""
    out, lse = _forward(query, key, value, bounds, bounds, (longest, longest), scale)
    return out, lse.t().contiguous()


def causal_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of this pass's share, given the output and log-sum-exp of all passes merged."""
    tensors = (grad_out, query, key, value, out, lse.t().contiguous())
    return _backward(tensors, bounds, bounds, (longest, longest), scale)


class RoutedKeys:
    """Keys and values that listed rows read; arguments and methods as in ``dense_cpu``."""

    def __init__(self, key: Tensor, value: Tensor, bounds: Tensor, block_size: int, scale: float) -> None:
        self.key, self.value, self.bounds = key, value, bounds
        self.block_size, self.scale = block_size, scale

    @cached_property
    def gradients(self) -> tuple[Tensor, Tensor]:
        """What ``backward`` adds up, (T, K, D) in fp32."""
        return torch.zeros_like(self.key, dtype=torch.float32), torch.zeros_like(self.value, dtype=torch.float32)

    def _heads(self, routes: Routes) -> list[tuple[int, slice, Tensor, tuple[int, int]]]:
        """(key/value head, places of its lists, their bounds, longest list and block) of every head that has any."""
        queries = pad(routes.lengths.cumsum(1), (1, 0)).int()
        sizes = torch.stack((routes.lengths.sum(1), routes.lengths.amax(1)), dim=1).tolist()
        heads, start = [], 0
        for head, (size, longest) in enumerate(sizes):
            if size:
                heads.append((head, slice(start, start + size), queries[head], (longest, self.block_size)))
            start += size
        return heads

    def forward(self, query: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:
        """Attention of listed rows to their block. query (rows, D); returns (P + 1, D), log-sum-exp (P + 1,)."""
        out = query.new_empty(len(routes.rows) + 1, query.shape[1])
        lse = torch.empty(len(routes.rows) + 1, dtype=torch.float32, device=query.device)
        out[-1], lse[-1] = 0, -torch.inf
        for head, places, queries, longest in self._heads(routes):
            keys, values = self.key[:, head : head + 1], self.value[:, head : head + 1]
            rows = query[routes.rows[places], None]
            part, part_lse = _forward(rows, keys, values, queries, self.bounds, longest, self.scale)
            out[places], lse[places] = part.squeeze(1), part_lse.squeeze(0)
        return out, lse

    def backward(self, grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor, routes: Routes) -> Tensor:
        """Gradient (P + 1, D) of the listed rows' queries; all arguments by row, out and lse of all passes merged."""
        grad_key, grad_value = self.gradients
        grad_query = query.new_empty(len(routes.rows) + 1, query.shape[1])
        grad_query[-1] = 0
        for head, places, queries, longest in self._heads(routes):
            keys, values = self.key[:, head : head + 1], self.value[:, head : head + 1]
            rows = routes.rows[places]
            tensors = (grad_out[rows, None], query[rows, None], keys, values, out[rows, None], lse[rows][None])
            gradients = _backward(tensors, queries, self.bounds, longest, self.scale)
            grad_query[places] = gradients[0].squeeze(1)
            grad_key[:, head] += gradients[1].squeeze(1)
            grad_value[:, head] += gradients[2].squeeze(1)
        return grad_query

    def add_gradients(self, grad_key: Tensor, grad_value: Tensor) -> None:
        """Add what ``backward`` gathered to (T, K, D) gradients."""
        grad_key += self.gradients[0]
        grad_value += self.gradients[1]
