"""The kernels in order, chunk by chunk: forward and backward of attention, given the lists of all kv heads.

Nothing is read back to the host: grids depend on shapes, or on bounds that hold whatever was chosen. All tensors are
contiguous; log-sum-exps are (K, W) fp32 in base 2. No lists: the own block is all that a query reads.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from moba_train.attention.blocks import Blocks
from moba_train.attention.kernels import backward, forward, merge
from moba_train.attention.kernels.plan import (
    FOLD_STAGES,
    Chunk,
    Config,
    Sizes,
    chunk_size,
    chunks,
    configs,
    shared_memory,
    sizes_of,
)
from moba_train.attention.kernels.route import Lists
from moba_train.attention.kernels.rows import LOG2_E
from moba_train.attention.kernels.tiles import tile

log = logging.getLogger(__name__)

ROW_DOT_ROWS = 64


def hopper_kernels(block_size: int, *tensors: Tensor) -> Any:
    """``on_hopper``; None also for blocks that are not whole key tiles."""
    return None if block_size % 128 else on_hopper(*tensors)


def on_hopper(*tensors: Tensor) -> Any:
    """The package of kernels for Hopper; None elsewhere, and for tensors that the copy engine cannot read."""
    device = tensors[0].device
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    if any(tensor.data_ptr() % 16 for tensor in tensors):
        return None
    return _gluon_kernels()


@cache
def _gluon_kernels() -> Any:
    try:
        from moba_train.attention.kernels import hopper
    except (ImportError, AttributeError) as error:  # a Triton whose Gluon is another
        log.warning(
            "attention moba: the slower kernels, since Triton %s has another Gluon (%s)", triton.__version__, error
        )
        return None
    return hopper


def _tuned(module: Any, sizes: Sizes) -> Any:
    """A module of the package for Hopper, if it is there and serves this head_dim."""
    return module if module is not None and sizes.head_dim in module.TILINGS else None


def attend(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, lists: Lists | None, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(out (T, H, D), log-sum-exp)."""
    sizes = sizes_of(query, key, lists, block_size)
    config = configs(sizes.head_dim, block_size, shared_memory(query.device))
    hopper = hopper_kernels(block_size, query, key, value)
    out = torch.empty_like(query)
    lse = torch.empty(sizes.kv_heads, sizes.rows, dtype=torch.float32, device=query.device)

    def partial_outputs(lists: Lists, kv_start: int, kv_heads: int, chunk: Chunk) -> tuple[Tensor, Tensor]:
        entries = chunk.rows * sizes.choose
        partial = torch.empty(kv_heads * entries, sizes.head_dim, dtype=query.dtype, device=query.device)
        partial_lse = torch.empty(kv_heads * entries, dtype=torch.float32, device=query.device)
        results = (partial, partial_lse, scale * LOG2_E, kv_start, chunk.row_start * sizes.choose, entries)
        if "resident" in config:
            count, tuned = len(blocks.first), _tuned(hopper and hopper.resident, sizes)
            listed = (
                blocks.bounds, lists.offsets, lists.entries, *results, count, lists.parts, chunk.part_start,
                chunk.part_stop - chunk.part_start, sizes.kv_heads,
            )  # fmt: skip
            if tuned is not None:
                tuned.launch(query, key, value, *listed, programs=count * kv_heads, sizes=sizes)
            else:
                forward.resident_forward_kernel[(count * kv_heads,)](
                    query, key, value, *listed, B=block_size, **sizes.constants(), **config["resident"].arguments()
                )
        elif (tuned := _tuned(hopper and hopper.forward, sizes)) is not None:
            found, numbers = _tiles(lists, kv_heads, chunk, entries, tuned.TILINGS[sizes.head_dim], sizes, blocks)
            arguments = (blocks.bounds, *found, *results, *numbers)
            tuned.launch(query, key, value, *arguments, tiles=len(found[0]), sizes=sizes)
        else:
            found, numbers = _tiles(lists, kv_heads, chunk, entries, config["forward"], sizes, blocks)
            forward.routed_forward_kernel[(len(found[0]),)](
                query, key, value, blocks.bounds, *found, *results, *numbers, B=block_size, **sizes.constants(),
                **config["forward"].arguments(),
            )  # fmt: skip
        return partial, partial_lse

    def merge_rows(partial: Tensor, partial_lse: Tensor, kv_start: int, kv_heads: int, chunk: Chunk) -> None:
        arguments = (
            query, key, value, blocks.bounds, blocks.first, blocks.of_token, partial, partial_lse, out, lse,
            scale * LOG2_E, kv_start, chunk.row_start, chunk.rows, sizes.tokens, sizes.kv_heads,
        )  # fmt: skip
        tuned = _tuned(hopper and hopper.own_forward, sizes)
        if tuned is not None and hopper.own.serves(sizes):
            tuned.launch(*arguments, kv_heads=kv_heads, sizes=sizes)
        else:
            merge.merge_kernel[(triton.cdiv(chunk.rows, config["merge"].rows), kv_heads)](
                *arguments, FOLD_STAGES=FOLD_STAGES, **sizes.constants(), **config["merge"].arguments()
            )

    if lists is None:
        merge_rows(out, lse, 0, sizes.kv_heads, Chunk(0, 1, 0, sizes.rows))
        return out, lse
    heads, tokens = chunk_size(sizes, query.element_size())
    for kv_start in range(0, sizes.kv_heads, heads):
        some = min(heads, sizes.kv_heads - kv_start)
        for chunk in chunks(lists, sizes, tokens):
            # The results go out of scope before the next chunk's are made.
            merge_rows(*partial_outputs(lists.of(kv_start, some), kv_start, some, chunk), kv_start, some, chunk)
    return out, lse


def _tiles(
    lists: Lists, kv_heads: int, chunk: Chunk, entries: int, config: Config, sizes: Sizes, blocks: Blocks
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The arguments by which a routed kernel finds its tile: tensors, the tiles' lists first, and numbers."""
    tiles = tile(lists, chunk.part_start, chunk.part_stop, kv_heads * entries, config.rows)
    count = len(blocks.first)
    numbers = (
        kv_heads * count,
        count,
        lists.parts,
        chunk.part_start,
        chunk.part_stop - chunk.part_start,
        sizes.kv_heads,
    )
    return (tiles.lists, tiles.of_list, lists.offsets, lists.entries), numbers


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
    """(dQ, dK, dV), from the forward's results."""
    sizes = sizes_of(query, key, lists, block_size)
    config = configs(sizes.head_dim, block_size, shared_memory(query.device))
    hopper = hopper_kernels(block_size, query, key, value, d_out)
    count, constants = len(blocks.first), sizes.constants()
    d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    delta = torch.empty_like(lse)
    backward.row_dot_kernel[(triton.cdiv(sizes.rows, ROW_DOT_ROWS), sizes.kv_heads)](
        out, d_out, delta, sizes.rows, sizes.kv_heads, G=sizes.group, D=sizes.head_dim, BLOCK_D=constants["BLOCK_D"],
        BLOCK_M=ROW_DOT_ROWS,
    )  # fmt: skip
    tensors = (query, key, value, d_out, lse, delta, blocks.bounds)

    def key_value(lists: Lists | None, partial: Tensor | None, kv_start: int, kv_heads: int) -> None:
        """dK and dV of some kv heads; also the partial dQ of their entries, where ``partial`` is given."""
        tuned = _tuned(hopper and hopper.key_value, sizes)
        ours = config["key_value" if partial is None else "key_value_query"]
        tiling = ours if tuned is None else tuned.TILINGS[sizes.head_dim]
        if lists is None:
            padded = (blocks.bounds, blocks.bounds, blocks.bounds, lse, delta)  # R = 0: not read
        else:
            entries = kv_heads * sizes.rows * sizes.choose
            tiles = tile(lists, 0, lists.parts, entries, tiling.rows)
            room = (len(tiles.lists) + 1) * tiling.rows  # one tile is read ahead
            padded = (
                tiles.of_list,
                torch.empty(room, dtype=torch.int32, device=query.device),
                torch.empty(room, dtype=torch.int32, device=query.device),
                torch.empty(room, dtype=torch.float32, device=query.device),
                torch.empty(room, dtype=torch.float32, device=query.device),
            )
            backward.pad_lists_kernel[(len(tiles.lists),)](
                tiles.lists, tiles.of_list, lists.offsets, lists.entries, lse, delta, *padded[1:], kv_start,
                sizes.rows, kv_heads * count, count, lists.parts, sizes.kv_heads, G=sizes.group, R=sizes.choose,
                BLOCK_M=tiling.rows, num_warps=1,
            )  # fmt: skip
        key_tiles = triton.cdiv(block_size, tiling.keys)
        programs = count * kv_heads * key_tiles
        arguments = (
            *tensors[3:], *padded, d_query if partial is None else partial, d_key, d_value, scale * LOG2_E, kv_start,
            kv_heads, sizes.rows, count, sizes.kv_heads,
        )  # fmt: skip
        if tuned is not None:
            tuned.launch(query, key, value, *arguments, programs=programs, sizes=sizes, entries=partial is not None)
        else:
            backward.key_value_kernel[(programs,)](
                *tensors[:3], *arguments, LOG2_E=LOG2_E, QUERY=partial is not None, B=block_size, **constants,
                **tiling.arguments(),
            )  # fmt: skip

    def partial_queries(lists: Lists, kv_start: int, kv_heads: int, chunk: Chunk) -> Tensor:
        entries = chunk.rows * sizes.choose
        partial = torch.empty(kv_heads * entries, sizes.head_dim, dtype=query.dtype, device=query.device)
        tuned = _tuned(hopper and hopper.query, sizes)
        tiling = config["query"] if tuned is None else tuned.TILINGS[sizes.head_dim]
        found, numbers = _tiles(lists, kv_heads, chunk, entries, tiling, sizes, blocks)
        arguments = (
            *tensors[3:], *found, partial, scale * LOG2_E, kv_start, chunk.row_start * sizes.choose, entries,
            sizes.rows, *numbers,
        )  # fmt: skip
        if tuned is not None:
            tuned.launch(query, key, value, *arguments, tiles=len(found[0]), sizes=sizes)
        else:
            backward.routed_query_kernel[(len(found[0]),)](
                *tensors[:3], *arguments, LOG2_E=LOG2_E, B=block_size, **constants, **tiling.arguments(),
            )  # fmt: skip
        return partial

    def merge_rows(partial: Tensor, kv_start: int, kv_heads: int, chunk: Chunk) -> None:
        arguments = (
            *tensors, blocks.first, blocks.of_token, partial, d_query, scale * LOG2_E, kv_start, chunk.row_start,
            chunk.rows, sizes.tokens, sizes.kv_heads,
        )  # fmt: skip
        tuned = _tuned(hopper and hopper.own_query, sizes)
        if tuned is not None and hopper.own.serves(sizes):
            tuned.launch(*arguments, kv_heads=kv_heads, sizes=sizes)
        else:
            backward.merge_query_kernel[(triton.cdiv(chunk.rows, config["merge_query"].rows), kv_heads)](
                *arguments, LOG2_E=LOG2_E, FOLD_STAGES=FOLD_STAGES, **constants, **config["merge_query"].arguments()
            )

    everything = Chunk(0, 1, 0, sizes.rows)
    if lists is None:
        key_value(None, None, 0, sizes.kv_heads)
        merge_rows(d_query, 0, sizes.kv_heads, everything)
        return d_query, d_key, d_value
    heads, tokens = chunk_size(sizes, query.element_size())
    for kv_start in range(0, sizes.kv_heads, heads):
        some = min(heads, sizes.kv_heads - kv_start)
        theirs = lists.of(kv_start, some)
        if "key_value_query" in config and tokens == sizes.tokens:
            entries = some * sizes.rows * sizes.choose
            partial = torch.empty(entries, sizes.head_dim, dtype=query.dtype, device=query.device)
            key_value(theirs, partial, kv_start, some)
            merge_rows(partial, kv_start, some, everything)
            del partial  # before the next chunk's is made
            continue
        key_value(theirs, None, kv_start, some)
        for chunk in chunks(lists, sizes, tokens):
            # The results go out of scope before the next chunk's are made.
            merge_rows(partial_queries(theirs, kv_start, some, chunk), kv_start, some, chunk)
    return d_query, d_key, d_value
