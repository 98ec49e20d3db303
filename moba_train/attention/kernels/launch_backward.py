"""The kernels of the backward pass in order, chunk by chunk, from the forward's choices and results.

As in the forward pass, nothing is read back to the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from moba_train.attention.blocks import Blocks
from moba_train.attention.kernels import backward
from moba_train.attention.kernels.call import Call
from moba_train.attention.kernels.lists import Lists
from moba_train.attention.kernels.plan import FOLD_STAGES, Chunk, chunk_size
from moba_train.attention.kernels.rows import LOG2_E
from moba_train.attention.kernels.tiles import tile

ROW_DOT_ROWS = 64


@dataclass(frozen=True)
class _Gradients:
    """What the kernels read beside the call's tensors, and what they write.

    Attributes:
        d_out: (T, H, D); lse: (K, W), of the forward pass; delta: (K, W), sum(out * d_out) of each row.
        d_query: (T, H, D); d_key and d_value: (T, K, D).
    """

    d_out: Tensor
    lse: Tensor
    delta: Tensor
    d_query: Tensor
    d_key: Tensor
    d_value: Tensor


def attend_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Blocks,
    lists: Lists | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV), like query, key and value, from ``launch_forward.attend``'s arguments and results."""
    call = Call.of(query, key, value, blocks, lists, block_size, scale, d_out)
    delta = _row_dot(call, out, d_out)
    made = _Gradients(d_out, lse, delta, *(torch.empty_like(x) for x in (query, key, value)))
    if lists is None:
        _key_value(call, made, None, None, 0, call.sizes.kv_heads)
        _merge_query(call, made, call.everything, made.d_query)  # R = 0: partial results are not read
        return made.d_query, made.d_key, made.d_value
    in_one_pass = "key_value_query" in call.configs and chunk_size(call.sizes, query.element_size())[1] == len(query)
    for theirs, kv_start, kv_heads in call.head_groups():
        if in_one_pass:
            chunk = Chunk(kv_start, kv_heads, 0, theirs.parts, 0, call.sizes.rows)
            _merge_query(call, made, chunk, _key_value(call, made, theirs, call.partial(chunk), kv_start, kv_heads))
            continue
        _key_value(call, made, theirs, None, kv_start, kv_heads)
        for chunk in call.chunks(kv_start, kv_heads):
            # The results go out of scope before the next chunk's are made.
            _merge_query(call, made, chunk, _partial_queries(call, made, theirs, chunk))
    return made.d_query, made.d_key, made.d_value


def _row_dot(call: Call, out: Tensor, d_out: Tensor) -> Tensor:
    """(K, W) fp32: sum(out * d_out) of each row."""
    sizes, constants = call.sizes, call.sizes.constants()
    delta = torch.empty(sizes.kv_heads, sizes.rows, dtype=torch.float32, device=out.device)
    backward.row_dot_kernel[(triton.cdiv(sizes.rows, ROW_DOT_ROWS), sizes.kv_heads)](
        out, d_out, delta, sizes.rows, sizes.kv_heads, G=sizes.group, D=sizes.head_dim, BLOCK_D=constants["BLOCK_D"],
        BLOCK_M=ROW_DOT_ROWS,
    )  # fmt: skip
    return delta


def _key_value(
    call: Call, made: _Gradients, lists: Lists | None, partial: Tensor | None, kv_start: int, kv_heads: int
) -> Tensor:
    """Write dK and dV of some kv heads; also the partial dQ of their entries, where there is room for it.

    Returns:
        ``partial``, or dQ, which the kernel does not touch then.
    """
    sizes, count = call.sizes, len(call.blocks.first)
    tuned = call.tuned("key_value")
    if tuned is not None and not tuned.serves(sizes, partial is not None):
        tuned = None
    ours = call.configs["key_value" if partial is None else "key_value_query"]
    tiling = ours if tuned is None else tuned.TILINGS[sizes.head_dim]
    programs = count * kv_heads * triton.cdiv(sizes.block_size, tiling.keys)
    tensors = (call.query, call.key, call.value)
    padded = _padded(call, made, lists, tiling.rows, kv_start, kv_heads)
    written = made.d_query if partial is None else partial
    arguments = (
        made.d_out, made.lse, made.delta, call.blocks.bounds, *padded, written, made.d_key, made.d_value, call.scale,
        kv_start, kv_heads, sizes.rows, count, sizes.kv_heads,
    )  # fmt: skip
    if tuned is not None:
        tuned.launch(*tensors, *arguments, programs=programs, sizes=sizes, entries=partial is not None)
    else:
        backward.key_value_kernel[(programs,)](
            *tensors, *arguments, LOG2_E=LOG2_E, QUERY=partial is not None, B=sizes.block_size, **sizes.constants(),
            **tiling.arguments(),
        )  # fmt: skip
    return written


def _padded(
    call: Call, made: _Gradients, lists: Lists | None, rows: int, kv_start: int, kv_heads: int
) -> tuple[Tensor, ...]:
    """The lists in whole tiles of ``rows``, as ``pad_lists`` writes them: the tiles of each list, then entries, rows,
    log-sum-exps and deltas. Without lists, tensors of these types, which are not read."""
    sizes, bounds, count = call.sizes, call.blocks.bounds, len(call.blocks.first)
    if lists is None:
        return bounds, bounds, bounds, made.lse, made.delta
    tiles = tile(lists, 0, lists.parts, kv_heads * sizes.rows * sizes.choose, rows)
    room = (len(tiles.lists) + 1) * rows  # one tile is read ahead
    types = (torch.int32, torch.int32, torch.float32, torch.float32)
    padded = [torch.empty(room, dtype=dtype, device=bounds.device) for dtype in types]
    backward.pad_lists_kernel[(len(tiles.lists),)](
        tiles.lists, tiles.of_list, lists.offsets, lists.entries, made.lse, made.delta, *padded, kv_start, sizes.rows,
        kv_heads * count, count, lists.parts, sizes.kv_heads, G=sizes.group, R=sizes.choose, BLOCK_M=rows, num_warps=1,
    )  # fmt: skip
    return tiles.of_list, *padded


def _partial_queries(call: Call, made: _Gradients, lists: Lists, chunk: Chunk) -> Tensor:
    """(entries, D): the part that each of a chunk's entries has in dQ."""
    sizes, partial, tuned = call.sizes, call.partial(chunk), call.tuned("query")
    tiling = call.configs["query"] if tuned is None else tuned.TILINGS[sizes.head_dim]
    found, numbers = call.tiles(lists, chunk, tiling)
    tensors = (call.query, call.key, call.value)
    arguments = (
        made.d_out, made.lse, made.delta, call.blocks.bounds, *found, partial, call.scale, chunk.kv_start,
        chunk.row_start * sizes.choose, chunk.rows * sizes.choose, sizes.rows, *numbers,
    )  # fmt: skip
    if tuned is not None:
        tuned.launch(*tensors, *arguments, tiles=len(found[0]), sizes=sizes)
    else:
        backward.routed_query_kernel[(len(found[0]),)](
            *tensors, *arguments, LOG2_E=LOG2_E, B=sizes.block_size, **sizes.constants(), **tiling.arguments()
        )
    return partial


def _merge_query(call: Call, made: _Gradients, chunk: Chunk, partial: Tensor) -> None:
    """Write dQ of a chunk's rows: that of the own block, and the sum of the partial ones."""
    sizes, blocks, tuned = call.sizes, call.blocks, call.tuned_own("own_query")
    arguments = (
        call.query, call.key, call.value, made.d_out, made.lse, made.delta, blocks.bounds, blocks.first,
        blocks.of_token, partial, made.d_query, call.scale, chunk.kv_start, chunk.row_start, chunk.rows, sizes.tokens,
        sizes.kv_heads,
    )  # fmt: skip
    if tuned is not None:
        tuned.launch(*arguments, kv_heads=chunk.kv_heads, sizes=sizes)
        return
    config = call.configs["merge_query"]
    backward.merge_query_kernel[(triton.cdiv(chunk.rows, config.rows), chunk.kv_heads)](
        *arguments, LOG2_E=LOG2_E, FOLD_STAGES=FOLD_STAGES, **sizes.constants(), **config.arguments()
    )
