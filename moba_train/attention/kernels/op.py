"""The ``triton`` backend: the kernels as PyTorch operators, so that autograd, torch.compile and checkpointing see them.

``moba_train::choose`` is the gate, ``moba_train::route`` makes lists of its choices, ``moba_train::attend`` attends.
Three operators, because choices and output are worth keeping (``keeping``). Lists are larger than choices and quickly
made again, but the backward pass takes the forward's. Operators take tensors alone: the fields of ``Blocks`` and
``Lists`` are arguments of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from moba_train.attention.blocks import Blocks, cut
from moba_train.attention.keeping import ATTENTION, CHOICES, keep
from moba_train.attention.kernels import launch_backward, launch_forward
from moba_train.attention.kernels.lists import Lists
from moba_train.attention.kernels.pool import pool
from moba_train.attention.kernels.route import parts_of
from moba_train.attention.kernels.route import route as make_lists
from moba_train.attention.kernels.select import choice_type, select
from moba_train.attention.spec import AttentionSpec, check_scale

SMALLEST_BLOCK = 16  # keys of the smallest tensor-core product
HEAD_DIMS = range(16, 257, 8)  # 16: the shortest sum of a tensor-core product
MOST_CHOSEN = 2048  # earlier blocks of a query, which the gate keeps in registers: 4,096 do not compile in 3 minutes
MOST_ENTRIES = 1 << 30  # of one kv head: entries and their padding are counted in int32
MOST_CHOICES = (1 << 31) - (1 << 20)  # of all heads: their lists have int32 bounds, and are read a tile ahead


@torch.library.custom_op("moba_train::choose", mutates_args=())
def choose(
    query: Tensor, key: Tensor, bounds: Tensor, first: Tensor, of_token: Tensor, block_size: int, top_k: int
) -> Tensor:
    """The gate: (K, T, G, top_k - 1) blocks of each query, counted from its segment's first (see ``select``)."""
    tokens, heads, _ = query.shape
    kv_heads = key.shape[1]
    if top_k == 1:
        shape = (kv_heads, tokens, heads // kv_heads, 0)
        return torch.empty(shape, dtype=choice_type(tokens, block_size), device=query.device)
    blocks = Blocks(bounds, first, of_token)
    query, key = query.contiguous(), key.contiguous()
    return keep(CHOICES, lambda: select(query, *pool(key, blocks), blocks, block_size, top_k - 1))


@choose.register_fake
def _(
    query: Tensor, key: Tensor, bounds: Tensor, first: Tensor, of_token: Tensor, block_size: int, top_k: int
) -> Tensor:
    tokens, heads, _ = query.shape
    shape = (key.shape[1], tokens, heads // key.shape[1], top_k - 1)
    return query.new_empty(shape, dtype=choice_type(tokens, block_size))


@torch.library.custom_op("moba_train::route", mutates_args=())
def route(choices: Tensor, bounds: Tensor, first: Tensor, of_token: Tensor) -> tuple[Tensor, Tensor]:
    """Entries and offsets of the ``Lists`` that the choices make; both are empty where top_k is 1."""
    if not choices.shape[-1]:
        return choices.new_empty(0, dtype=torch.int32), choices.new_empty(0, dtype=torch.int32)
    lists = make_lists(choices.contiguous(), Blocks(bounds, first, of_token))
    return lists.entries, lists.offsets


@route.register_fake
def _(choices: Tensor, bounds: Tensor, first: Tensor, of_token: Tensor) -> tuple[Tensor, Tensor]:
    kv_heads, tokens, group, choose = choices.shape
    count = first.shape[0]  # not ``len``: see ``most_blocks``
    parts = parts_of(tokens, kv_heads, group * choose, count, choices.device)[0] if choose else 0
    shape = (kv_heads, parts + 1, count) if choose else (0,)
    entries, offsets = (choices.new_empty(size, dtype=torch.int32) for size in (choices.numel(), shape))
    return entries, offsets


def _lists(key: Tensor, entries: Tensor, offsets: Tensor) -> Lists | None:
    return Lists(entries, offsets, triton.cdiv(len(key), offsets.shape[1] - 1)) if len(entries) else None


@torch.library.custom_op("moba_train::attend", mutates_args=())
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    first: Tensor,
    of_token: Tensor,
    entries: Tensor,
    offsets: Tensor,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out (T, H, D), log-sum-exp (K, T * G)) of attention to the listed blocks and the own one."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    blocks, lists = Blocks(bounds, first, of_token), _lists(key, entries, offsets)
    return keep(ATTENTION, lambda: launch_forward.attend(query, key, value, blocks, lists, block_size, scale))


@attend.register_fake
def _(query: Tensor, key: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = query.shape
    kv_heads = key.shape[1]
    lse = query.new_empty((kv_heads, tokens * (heads // kv_heads)), dtype=torch.float32)
    return query.new_empty(query.shape), lse


@torch.library.custom_op("moba_train::attend_backward", mutates_args=())
def attend_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    first: Tensor,
    of_token: Tensor,
    entries: Tensor,
    offsets: Tensor,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV)."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    blocks, lists = Blocks(bounds, first, of_token), _lists(key, entries, offsets)
    return launch_backward.attend_backward(
        d_out.contiguous(), query, key, value, out, lse, blocks, lists, block_size, scale
    )


@attend_backward.register_fake
def _(d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx, inputs, output) -> None:
    query, key, value, bounds, first, of_token, entries, offsets, ctx.block_size, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, out, lse, bounds, first, of_token, entries, offsets)


def _gradients(ctx, d_out: Tensor, _d_lse: Tensor):
    return *attend_backward(d_out, *ctx.saved_tensors, ctx.block_size, ctx.scale), *[None] * 7


attend.register_autograd(_gradients, setup_context=_save)


def room(top_k: int, block_size: int, longest: int) -> int:
    """Earlier blocks that a query is given room for, where the longest segment has so many tokens: top_k - 1, or, where
    there are fewer, their number rounded up to a power of two. The kernels are compiled for each, and texts of many
    lengths would have them compiled for every number of blocks; places that stay empty change no bit."""
    return min(top_k - 1, triton.next_power_of_2((longest - 1) // block_size))


def refuses(query: Tensor, key: Tensor, spec: AttentionSpec) -> str | None:
    """Why the kernels cannot serve these tensors; None if they can."""
    if spec.kind != "moba":
        return f"it computes moba, not {spec.kind}"
    block_size, top_k = spec.moba
    if query.device.type == "cuda":
        if torch.cuda.get_device_capability(query.device) < (8, 0):
            return "it needs compute capability 8.0 or later"
    elif not triton.knobs.runtime.interpret:
        return f"it needs a CUDA device and the tensors are on {query.device}"
    elif query.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 as integers"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not {query.dtype}"
    tokens, heads, head_dim = query.shape
    if head_dim not in HEAD_DIMS:
        return f"it takes head_dim in multiples of 8 from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}, and query has {head_dim}"
    if block_size < SMALLEST_BLOCK:
        return f"block_size {block_size} is below {SMALLEST_BLOCK}"
    chosen = room(top_k, block_size, tokens)  # at most: one segment has most blocks
    if chosen > MOST_CHOSEN:
        return f"top_k {top_k} is {chosen} earlier blocks a query, above {MOST_CHOSEN}; use a larger block_size"
    choices = tokens * heads * chosen
    for whose, made, most in (
        ("one kv head makes", choices // key.shape[1], MOST_ENTRIES),
        ("there are", choices, MOST_CHOICES),
    ):
        if made >= most:
            return f"{whose} {made} choices, above {most}; use a smaller top_k or fewer tokens"
    return None


def triton_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, spec: AttentionSpec, scale: float
) -> Tensor:
    """MoBA in fused kernels; forward and backward repeat bit by bit. Arguments and result as in ``reference``.

    A value that is not a number reaches the rows of its segment and, unlike in ``reference``, may reach rows of a
    neighbouring segment that share a tile with it.

    Raises:
        ValueError: as ``check_scale``.
    """
    block_size, top_k = spec.moba
    check_scale(scale)
    blocks = cut(cu_seqlens, block_size, len(query))
    bounds = (blocks.bounds, blocks.first, blocks.of_token)
    choices = choose(query.detach(), key.detach(), *bounds, block_size, 1 + room(top_k, block_size, max_seqlen))
    out, _ = attend(query, key, value, *bounds, *route(choices, *bounds), block_size, scale)
    return out
