"""MoBA from dense FlashAttention passes: never tokens x tokens memory, exact gradients.

One pass reads every query's own block causally, one pass sends each query to the blocks it chose; both give an output
and a log-sum-exp, which merge into one softmax over all keys read. Backward runs the same passes with the merged output
and log-sum-exp: each then yields its exact share of the gradients. ``full`` is the causal pass over whole segments.
MoBA's work goes through ranges of tokens, so that the partial outputs of routed queries stay bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from moba_train.attention import dense_cpu, dense_cuda
from moba_train.attention.blocks import cut, most_blocks
from moba_train.attention.gate import choose, index_type
from moba_train.attention.keeping import ATTENTION, CHOICES, keep
from moba_train.attention.routing import route
from moba_train.attention.spec import AttentionSpec

WORKSPACE_ELEMENTS = 1 << 24  # of the routed queries' partial outputs, where the query itself is not larger


def varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, spec: AttentionSpec, scale: float
) -> Tensor:
    """Attention within segments; arguments and result as in ``reference``.

    On CUDA it computes in the inputs' type with fp32 accumulation, on the CPU in fp32 (fp64 for fp64 inputs). ``moba``
    reads block bounds and list lengths back to the host; ``full`` on CUDA reads nothing.
    """
    if spec.kind == "full":
        if query.is_cuda and (rows := whole_rows(len(query), cu_seqlens, max_seqlen)):
            return dense_cuda.whole_rows(query, key, value, rows, scale)
        return varlen_full(query, key, value, cu_seqlens, max_seqlen, scale)[0]
    block_size, top_k = spec.moba
    block_size = min(block_size, max_seqlen)  # room is made for so many tokens and choices
    top_k = min(top_k, (max_seqlen - 1) // block_size + 1)
    choices = varlen_choose(query.detach(), key.detach(), cu_seqlens, block_size, top_k)
    bounds = cut(cu_seqlens, block_size, len(query)).bounds
    return varlen_moba(query, key, value, choices, bounds, block_size, scale)[0]


def whole_rows(tokens: int, cu_seqlens: Tensor, max_seqlen: int) -> int:
    """Segments, where all are equally long, else 0. The bounds themselves are not read: as many segments, of
    ``max_seqlen`` at most, make up all tokens only if each has that length."""
    segments = len(cu_seqlens) - 1
    return segments if segments == 1 or segments * max_seqlen == tokens else 0


@torch.library.custom_op("moba_train::varlen_choose", mutates_args=())
def varlen_choose(query: Tensor, key: Tensor, cu_seqlens: Tensor, block_size: int, top_k: int) -> Tensor:
    """The gate as an operator of its own: (T, H, top_k - 1) small integers."""
    blocks = cut(cu_seqlens, block_size, len(query))
    kind = index_type(most_blocks(cu_seqlens, block_size, len(query)))
    return keep(CHOICES, lambda: choose(query, key, blocks, AttentionSpec("moba", block_size, top_k)).to(kind))


def refuses(query: Tensor, key: Tensor, spec: AttentionSpec) -> str | None:
    """Why ``varlen`` cannot serve tensors like these, or None."""
    if query.device.type == "cpu":
        return None
    if query.device.type != "cuda":
        return f"FlashAttention runs on CPU and CUDA, and query is on {query.device.type}"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention on CUDA takes bfloat16 and float16, and query is {query.dtype}"
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        return f"FlashAttention on CUDA takes head_dim up to 256 in multiples of 8, and query has {query.shape[-1]}"
    return None


# Both kinds are operators: what they give is kept for a second computation below autograd (``keeping``).
@torch.library.custom_op("moba_train::varlen_full", mutates_args=())
def varlen_full(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (T, H, D) and log-sum-exp (T, H) of dense causal attention within segments."""

    def compute() -> tuple[Tensor, Tensor]:
        dense, inputs = _dense(query, key, value)
        out, lse = dense.causal_forward(*inputs, cu_seqlens, max_seqlen, scale)
        return out.to(query.dtype), lse

    return keep(ATTENTION, compute)


@torch.library.custom_op("moba_train::varlen_full_backward", mutates_args=())
def varlen_full_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    dense, inputs = _dense(grad_out, query, key, value, out)
    grad_query, grad_key, grad_value = dense.causal_backward(*inputs, lse, cu_seqlens, max_seqlen, scale)
    return grad_query.to(query.dtype), grad_key.to(query.dtype), grad_value.to(query.dtype)


@torch.library.custom_op("moba_train::varlen_moba", mutates_args=())
def varlen_moba(
    query: Tensor, key: Tensor, value: Tensor, choices: Tensor, bounds: Tensor, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (T, H, D) and log-sum-exp (T, H) of attention to the own and the chosen blocks."""
    return keep(ATTENTION, lambda: _moba_forward(query, key, value, choices, bounds, block_size, scale))


def _moba_forward(
    query: Tensor, key: Tensor, value: Tensor, choices: Tensor, bounds: Tensor, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    dense, (q, k, v) = _dense(query, key, value)
    keys = dense.RoutedKeys(k, v, bounds, block_size, scale)
    merged = query.new_empty(query.shape)
    merged_lse = query.new_empty(query.shape[:2], dtype=_accumulator(query))
    for here, spans in _ranges(bounds, choices, query.shape[-1]):
        out, lse = dense.causal_forward(q[here], k[here], v[here], spans, block_size, scale)
        routes = route(choices[here], key.shape[1], len(bounds) - 1, dense.tile_rows(block_size))
        if routes is not None:
            parts, parts_lse = keys.forward(q[here].flatten(0, 1), routes)
            out, lse = _merge(out, lse, parts, parts_lse, routes.places)
        merged[here], merged_lse[here] = out, lse
    return merged, merged_lse


@torch.library.custom_op("moba_train::varlen_moba_backward", mutates_args=())
def varlen_moba_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    merged: Tensor,
    merged_lse: Tensor,
    choices: Tensor,
    bounds: Tensor,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    dense, (grad, q, k, v, out) = _dense(grad_out, query, key, value, merged)
    keys = dense.RoutedKeys(k, v, bounds, block_size, scale)
    grad_query = query.new_empty(query.shape)
    grad_key, grad_value = (x.new_empty(x.shape, dtype=_accumulator(x)) for x in (key, value))
    for here, spans in _ranges(bounds, choices, query.shape[-1]):
        inputs = (grad[here], q[here], k[here], v[here], out[here], merged_lse[here])
        grad_q, grad_key[here], grad_value[here] = dense.causal_backward(*inputs, spans, block_size, scale)
        routes = route(choices[here], key.shape[1], len(bounds) - 1, dense.tile_rows(block_size))
        if routes is not None:
            by_row = (x.flatten(0, 1) for x in (grad[here], q[here], out[here], merged_lse[here]))
            parts = keys.backward(*by_row, routes)
            grad_q = grad_q + _sum_slots(parts, routes.places).view(grad_q.shape)
        grad_query[here] = grad_q
    keys.add_gradients(grad_key, grad_value)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, *(x for x in rest if isinstance(x, Tensor)))
    ctx.sizes = [x for x in rest if not isinstance(x, Tensor)]
    ctx.no_gradients = len(rest)


def _full_gradients(ctx: Any, grad_out: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    return *varlen_full_backward(grad_out, *ctx.saved_tensors, *ctx.sizes), *[None] * ctx.no_gradients


def _moba_gradients(ctx: Any, grad_out: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    return *varlen_moba_backward(grad_out, *ctx.saved_tensors, *ctx.sizes), *[None] * ctx.no_gradients


def _empty_choices(query: Tensor, key: Tensor, cu_seqlens: Tensor, block_size: int, top_k: int) -> Tensor:
    kind = index_type(most_blocks(cu_seqlens, block_size, query.shape[0]))
    return query.new_empty((*query.shape[:2], top_k - 1), dtype=kind)


def _empty_outputs(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=_accumulator(query))


def _empty_gradients(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


varlen_full.register_autograd(_full_gradients, setup_context=_save)
varlen_moba.register_autograd(_moba_gradients, setup_context=_save)
varlen_choose.register_fake(_empty_choices)
varlen_full.register_fake(_empty_outputs)
varlen_moba.register_fake(_empty_outputs)
varlen_full_backward.register_fake(_empty_gradients)
varlen_moba_backward.register_fake(_empty_gradients)


def _dense(*tensors: Tensor) -> tuple[Any, list[Tensor]]:
    """The module with the dense passes of these tensors' device, and the tensors in the type that it works in."""
    if tensors[0].is_cuda:
        return dense_cuda, [x.contiguous() for x in tensors]
    return dense_cpu, [x.to(_accumulator(x)).contiguous() for x in tensors]


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _ranges(bounds: Tensor, choices: Tensor, head_dim: int) -> Iterator[tuple[slice, Tensor]]:
    """Cut the tokens at block bounds into ranges whose routed queries fit the workspace.

    Yields the tokens of a range and the bounds of its blocks, counted from its first token.
    """
    tokens, heads, slots = choices.shape
    budget = max(WORKSPACE_ELEMENTS, tokens * heads * head_dim) // (heads * head_dim * max(slots, 1))
    edges = bounds.tolist()
    first = 0
    for last in range(1, len(edges)):
        if last == len(edges) - 1 or edges[last + 1] - edges[first] > budget:
            if edges[first] < edges[last]:
                yield slice(edges[first], edges[last]), bounds[first : last + 1] - edges[first]
            first = last


def _merge(out: Tensor, lse: Tensor, parts: Tensor, parts_lse: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of all passes.

    Args:
        out, lse: (T, H, D) and (T, H) of the causal pass.
        parts, parts_lse: (P + 1, D) and (P + 1,) of the routed pass.
        places: (T * H, top_k - 1), where a row's routed results are.
    """
    every = torch.cat((lse.flatten()[:, None], parts_lse[places]), dim=1)  # (T * H, top_k)
    merged_lse = every.logsumexp(dim=1, keepdim=True)
    weights = every.sub_(merged_lse).exp_()
    merged = out.to(weights.dtype).mul_(weights[:, :1].view(*lse.shape, 1))
    merged += _sum_slots(parts, places, weights[:, 1:]).view(out.shape)
    return merged, merged_lse.view(lse.shape)


def _sum_slots(parts: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over slots of parts (P + 1, D) at places (rows, slots), times weights like places: (rows, D), not rounded."""
    if parts.device.type == "cpu":
        return embedding_bag(places, parts, per_sample_weights=weights, mode="sum")
    # On a GPU parts are in half precision, to which embedding_bag would round the weights and the sum.
    total = torch.zeros(len(places), parts.shape[1], dtype=torch.float32, device=parts.device)
    for slot, place in enumerate(places.unbind(1)):
        total += parts[place] if weights is None else parts[place] * weights[:, slot, None]
    return total
