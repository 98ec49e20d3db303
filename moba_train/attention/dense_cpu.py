"""The dense passes of ``varlen`` on a CPU, on torch's FlashAttention for CPU.

That kernel takes a batch of equal lengths, so the passes cut their work into such batches: causal spans are grouped by
length, routed rows come in tiles. Inputs are fp32 or fp64: ``varlen`` widens others, because torch's bf16 kernel is no
faster than that on CPUs without bf16 matrix units, and its backward five times slower.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from moba_train.attention.routing import Routes

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

CHUNK_ELEMENTS = 1 << 19  # gathered rows and keys of the tiles that exist at one time (2 MiB in fp32, near the caches)


def tile_rows(block_size: int) -> int:
    """Rows of a routed tile: few, so that padding is cheap, but enough to pay for gathering a block's keys again."""
    return min(max(2 * block_size, 16), 128)


def _silence(lse: Tensor, padding: Tensor) -> Tensor:
    """Make padding add nothing to gradients: an infinite log-sum-exp, in place, makes its probabilities exactly 0."""
    return lse.masked_fill_(padding, torch.inf)


@dataclass(frozen=True)
class _Group:
    """Spans computed in one call: ``count`` of them, ``width`` tokens each, shorter ones padded at their end.

    Padding repeats the span's first token. A causal query never reads what is behind it; what a padded query adds to
    gradients is made 0 by ``_silence``.
    """

    count: int
    width: int
    start: int  # the first span's first token; without an index the spans follow each other from there
    index: Tensor | None = None  # (count, width) tokens, where they do not
    real: Tensor | None = None  # (count, width) bool

    def take(self, tensor: Tensor) -> Tensor:
        """(T, heads, …) to (count, heads, width, …), a view where possible."""
        if self.index is None:
            spans = tensor[self.start : self.start + self.count * self.width].unflatten(0, (self.count, self.width))
        else:
            spans = tensor[self.index]
        return spans.transpose(1, 2)

    def put(self, tensor: Tensor, spans: Tensor) -> None:
        """Write (count, heads, width, …) to the spans' tokens in (T, heads, …)."""
        spans = spans.transpose(1, 2)
        if self.index is None:
            tensor[self.start : self.start + self.count * self.width].unflatten(0, spans.shape[:2]).copy_(spans)
        else:
            tensor[self.index[self.real]] = spans[self.real]


def _groups(bounds: list[int]) -> list[_Group]:
    """Group spans by length: long and frequent lengths exactly, others rounded up to three binary digits."""
    spans = [(start, stop - start) for start, stop in pairwise(bounds) if start < stop]
    frequency = Counter(length for _, length in spans)
    members: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for start, length in spans:
        step = 1 if length >= 1024 or frequency[length] >= 8 else 1 << max(0, length.bit_length() - 3)
        members[-(-length // step) * step].append((start, length))
    return [_group(width, spans) for width, spans in members.items()]


def _group(width: int, spans: list[tuple[int, int]]) -> _Group:
    first = spans[0][0]
    if all(span == (first + i * width, width) for i, span in enumerate(spans)):
        return _Group(len(spans), width, first)
    starts, lengths = torch.tensor(spans)[:, :, None].unbind(1)
    offset = torch.arange(width)
    real = offset < lengths
    return _Group(len(spans), width, first, starts + torch.where(real, offset, 0), real)


def causal_forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Dense causal attention within each span.

    Args:
        query: (T, H, D).
        key, value: (T, K, D).
        bounds: (spans + 1,) int32.
        longest: tokens of the longest span (not needed here).
        scale: of the logits.

    Returns:
        out (T, H, D) and its log-sum-exp (T, H).
    """
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[:2])
    for group in _groups(bounds.tolist()):
        spans, spans_lse = _forward(*(group.take(x) for x in (query, key, value)), is_causal=True, scale=scale)
        group.put(out, spans)
        group.put(lse, spans_lse)
    return out, lse


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
    gradients = tuple(torch.empty_like(x) for x in (query, key, value))
    for group in _groups(bounds.tolist()):
        inputs = [group.take(x) for x in (grad_out, query, key, value, out, lse)]
        if group.real is not None:
            _silence(inputs[-1], ~group.real[:, None])
        spans = _backward(*inputs, 0.0, True, scale=scale)
        for gradient, part in zip(gradients, spans, strict=True):
            group.put(gradient, part)
    return gradients


class RoutedKeys:
    """Keys and values by block, for tiles of routed rows; ``backward`` adds up their gradients.

    Args:
        key, value: (T, K, D).
        bounds: (N + 1,) block bounds; only full-size blocks are ever routed to.
        block_size: B.
        scale: of the logits.
    """

    def __init__(self, key: Tensor, value: Tensor, bounds: Tensor, block_size: int, scale: float) -> None:
        full = bounds.diff() == block_size
        self.tokens = (bounds[:-1][full].long()[:, None] + torch.arange(block_size)).flatten()  # of all full blocks
        self.number = full.cumsum(0) - 1  # of a block among the full ones
        self.block_size, self.scale, self.shape = block_size, scale, key.shape
        self.key, self.value = self._by_block(key), self._by_block(value)

    @cached_property
    def gradients(self) -> tuple[Tensor, Tensor]:
        """What ``backward`` adds up, by block."""
        return torch.zeros_like(self.key), torch.zeros_like(self.value)

    def _by_block(self, tensor: Tensor) -> Tensor:
        """(T, K, D) to (K * full blocks, B * D)."""
        return tensor[self.tokens].transpose(0, 1).reshape(-1, self.block_size * tensor.shape[2])

    def _chunks(self, routes: Routes) -> list[tuple[slice, Tensor]]:
        """(places, key block of each tile) of the tiles that are computed in one call."""
        _, kv_heads, head_dim = self.shape
        blocks = self.number + torch.arange(kv_heads)[:, None] * (len(self.tokens) // self.block_size)
        source = blocks.flatten().repeat_interleave(routes.tiles.flatten())
        rows = len(routes.rows) // len(source)
        size = max(1, CHUNK_ELEMENTS // (2 * (rows + self.block_size) * head_dim))
        return [
            (slice(start * rows, (start + len(part)) * rows), part)
            for start, part in zip(range(0, len(source), size), source.split(size), strict=True)
        ]

    def _take(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of some tiles, (tiles, 1, B, D) each."""
        shape = (len(source), 1, self.block_size, -1)
        return self.key.index_select(0, source).view(shape), self.value.index_select(0, source).view(shape)

    def forward(self, query: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:
        """Attention of listed rows to their block. query (rows, D); returns (P + 1, D), log-sum-exp (P + 1,)."""
        out = query.new_empty(len(routes.rows) + 1, query.shape[1])
        lse = query.new_empty(len(routes.rows) + 1)
        out[-1], lse[-1] = 0, -torch.inf
        for places, source in self._chunks(routes):
            tiles = query.index_select(0, routes.rows[places]).view(len(source), 1, -1, query.shape[1])
            tiles_out, tiles_lse = _forward(tiles, *self._take(source), scale=self.scale)
            out[places] = tiles_out.reshape(-1, query.shape[1])
            lse[places] = tiles_lse.flatten()
        return out, lse

    def backward(self, grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor, routes: Routes) -> Tensor:
        """Gradient (P + 1, D) of the listed rows' queries; all arguments by row, out and lse of all passes merged."""
        grad_key, grad_value = self.gradients
        grad_query = query.new_empty(len(routes.rows) + 1, query.shape[1])
        grad_query[-1] = 0
        listed_lse = _silence(lse[routes.rows], routes.padding)
        for places, source in self._chunks(routes):
            rows = routes.rows[places]
            tiled = (len(source), 1, -1, query.shape[1])
            tile_grad, tile_query, tile_out = (x.index_select(0, rows).view(tiled) for x in (grad_out, query, out))
            tile_key, tile_value = self._take(source)
            tile_lse = listed_lse[places].view(tiled[:3])
            grads = _backward(
                tile_grad, tile_query, tile_key, tile_value, tile_out, tile_lse, 0.0, False, scale=self.scale
            )
            grad_query[places] = grads[0].reshape(-1, query.shape[1])
            grad_key.index_add_(0, source, grads[1].reshape(len(source), -1))
            grad_value.index_add_(0, source, grads[2].reshape(len(source), -1))
        return grad_query

    def add_gradients(self, grad_key: Tensor, grad_value: Tensor) -> None:
        """Add what ``backward`` gathered to (T, K, D) gradients."""
        kv_heads, head_dim = self.shape[1:]
        for gradient, blocks in zip((grad_key, grad_value), self.gradients, strict=True):
            rows = blocks.view(kv_heads, len(self.tokens), head_dim).transpose(0, 1)
            gradient.view(len(gradient), -1).index_add_(0, self.tokens, rows.flatten(1))
