"""The kernels in order, over the workspace's chunks: forward and backward of attention, given the choices.

Partial outputs (and, in backward, partial dQ) would be R times the queries. They live in a workspace that holds those
of one chunk: some kv heads and, where one kv head's do not fit, some of the tokens. Nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from moba_train.attention.blocks import Blocks
from moba_train.attention.kernels import backward, forward, merge
from moba_train.attention.kernels.route import Lists, Tiles, route, tile
from moba_train.attention.kernels.rows import LOG2_E

WORKSPACE_SHARE = 0.5  # of the bytes of query, key, value, out and their gradients
WORKSPACE_FLOOR = 64 << 20  # bytes that are never worth a second chunk
ROW_DOT_ROWS = 64


@dataclass(frozen=True)
class Config:
    """Tile sizes and pipeline of a kernel: BLOCK_M rows, BLOCK_N keys."""

    rows: int
    keys: int
    warps: int
    stages: int

    def arguments(self) -> dict[str, int]:
        return dict(BLOCK_M=self.rows, BLOCK_N=self.keys, num_warps=self.warps, num_stages=self.stages)


def configs(head_dim: int, block_size: int) -> dict[str, Config]:
    """The kernels' tiles: as large as registers (255 a thread) and shared memory (227 KiB on Hopper) allow."""
    keys = max(16, triton.next_power_of_2(block_size))
    if head_dim <= 64:
        table = {
            "forward": Config(128, min(keys, 128), 4, 3),
            "merge": Config(128, min(keys, 64), 4, 2),
            "query": Config(128, min(keys, 64), 4, 3),
            "merge_query": Config(128, min(keys, 64), 4, 2),
            "key_value": Config(64, min(keys, 128), 4, 2),
        }
    elif head_dim <= 128:
        table = {
            "forward": Config(128, min(keys, 64), 8, 3),
            "merge": Config(128, min(keys, 64), 8, 2),
            "query": Config(128, min(keys, 64), 8, 2),
            "merge_query": Config(128, min(keys, 64), 8, 2),
            "key_value": Config(64, min(keys, 128), 8, 2),
        }
    else:
        table = {
            "forward": Config(64, min(keys, 32), 4, 2),
            "merge": Config(64, min(keys, 32), 4, 2),
            "query": Config(64, min(keys, 32), 4, 1),
            "merge_query": Config(64, min(keys, 32), 4, 1),
            "key_value": Config(32, min(keys, 32), 4, 1),
        }
    return table


@dataclass(frozen=True)
class Sizes:
    """What every launch needs to know."""

    tokens: int
    kv_heads: int
    group: int
    choose: int
    head_dim: int
    block_size: int

    @property
    def rows(self) -> int:
        return self.tokens * self.group

    def constants(self) -> dict[str, int]:
        return dict(
            G=self.group, R=self.choose, D=self.head_dim, BLOCK_D=max(16, triton.next_power_of_2(self.head_dim))
        )


def sizes_of(query: Tensor, key: Tensor, choices: Tensor, block_size: int) -> Sizes:
    tokens, heads, head_dim = query.shape
    return Sizes(tokens, key.shape[1], heads // key.shape[1], choices.shape[-1], head_dim, block_size)


def _kv_heads_at_once(sizes: Sizes, element: int) -> tuple[int, int]:
    """(kv heads, tokens) of a chunk: partial results of D elements and two words an entry fit the workspace."""
    whole = 4 * (sizes.group + 1) * sizes.kv_heads * sizes.tokens * sizes.head_dim * element
    room = max(WORKSPACE_FLOOR, int(WORKSPACE_SHARE * whole))
    token = sizes.group * sizes.choose * (sizes.head_dim * element + 8)
    heads = min(sizes.kv_heads, max(1, room // (token * sizes.tokens)))
    heads = triton.cdiv(sizes.kv_heads, triton.cdiv(sizes.kv_heads, heads))
    return heads, min(sizes.tokens, max(1, room // token))


@dataclass(frozen=True)
class Chunk:
    """Tokens ``part_start:part_stop`` (in parts) of the kv heads from ``kv_start`` on, and their tiles of entries."""

    lists: Lists
    tiles: Tiles
    kv_start: int
    kv_heads: int
    part_start: int
    part_stop: int
    row_start: int
    rows: int


def _routed(choices: Tensor, blocks: Blocks, heads: int) -> Iterator[tuple[int, int, Lists]]:
    """Some kv heads at a time: the first, their number, and their lists."""
    for kv_start in range(0, len(choices), heads):
        some = choices[kv_start : kv_start + heads]
        yield kv_start, len(some), route(some, blocks)


def _chunks(lists: Lists, kv_start: int, kv_heads: int, sizes: Sizes, tokens: int, tile_rows: int) -> Iterator[Chunk]:
    """The chunks of routed kv heads, at most about ``tokens`` tokens each."""
    step = max(1, tokens // lists.part_tokens)
    for part_start in range(0, lists.parts, step):
        part_stop = min(part_start + step, lists.parts)
        start = part_start * lists.part_tokens
        rows = (min(part_stop * lists.part_tokens, sizes.tokens) - start) * sizes.group
        tiles = tile(lists, kv_heads, part_start, part_stop, kv_heads * rows * sizes.choose, tile_rows)
        yield Chunk(lists, tiles, kv_start, kv_heads, part_start, part_stop, start * sizes.group, rows)


def _list_arguments(chunk: Chunk, sizes: Sizes, count: int) -> tuple:
    """(lists, rest): the arguments by which a routed kernel finds its tile."""
    pointers = (chunk.tiles.lists, chunk.tiles.of_list, chunk.lists.offsets, chunk.lists.entries)
    numbers = (
        chunk.kv_heads * count,
        count,
        chunk.lists.parts,
        chunk.part_start,
        chunk.part_stop - chunk.part_start,
        sizes.kv_heads,
    )
    return pointers, numbers


def attend(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, choices: Tensor, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(out (T, H, D), log-sum-exp (K, W) fp32 in base 2). All contiguous; ``choices`` as ``select`` gives them."""
    sizes = sizes_of(query, key, choices, block_size)
    config = configs(sizes.head_dim, block_size)
    none = torch.iinfo(choices.dtype).max
    out = torch.empty_like(query)
    lse = torch.empty(sizes.kv_heads, sizes.rows, dtype=torch.float32, device=query.device)

    def merge_rows(
        partial: Tensor, partial_lse: Tensor, kv_start: int, kv_heads: int, row_start: int, rows: int
    ) -> None:
        merge.merge_kernel[(triton.cdiv(rows, config["merge"].rows), kv_heads)](
            query, key, value, blocks.bounds, blocks.of_token, choices, partial, partial_lse, out, lse, scale * LOG2_E,
            kv_start, row_start, rows, sizes.tokens, sizes.kv_heads, NONE=none, **sizes.constants(),
            **config["merge"].arguments(),
        )  # fmt: skip

    if sizes.choose == 0:
        merge_rows(out, lse, 0, sizes.kv_heads, 0, sizes.rows)
        return out, lse
    heads, tokens = _kv_heads_at_once(sizes, query.element_size())
    for kv_start, kv_heads, lists in _routed(choices, blocks, heads):
        for chunk in _chunks(lists, kv_start, kv_heads, sizes, tokens, config["forward"].rows):
            entries = chunk.rows * sizes.choose
            partial = torch.empty(kv_heads * entries, sizes.head_dim, dtype=query.dtype, device=query.device)
            partial_lse = torch.empty(kv_heads * entries, dtype=torch.float32, device=query.device)
            pointers, numbers = _list_arguments(chunk, sizes, len(blocks.first))
            forward.routed_forward_kernel[(len(chunk.tiles.lists),)](
                query, key, value, blocks.bounds, *pointers, partial, partial_lse, scale * LOG2_E, kv_start,
                chunk.row_start * sizes.choose, entries, *numbers, B=block_size, **sizes.constants(),
                **config["forward"].arguments(),
            )  # fmt: skip
            merge_rows(partial, partial_lse, kv_start, kv_heads, chunk.row_start, chunk.rows)
            del partial, partial_lse  # before the next chunk's are made
    return out, lse


def attend_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    blocks: Blocks,
    choices: Tensor,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV), from the forward's choices and results. Shapes as in ``attend``."""
    sizes = sizes_of(query, key, choices, block_size)
    config = configs(sizes.head_dim, block_size)
    count, none = len(blocks.first), torch.iinfo(choices.dtype).max
    d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    delta = torch.empty_like(lse)
    constants = sizes.constants()
    backward.row_dot_kernel[(triton.cdiv(sizes.rows, ROW_DOT_ROWS), sizes.kv_heads)](
        out, d_out, delta, sizes.rows, sizes.kv_heads, G=sizes.group, D=sizes.head_dim, BLOCK_D=constants["BLOCK_D"],
        BLOCK_M=ROW_DOT_ROWS,
    )  # fmt: skip
    tensors = (query, key, value, d_out, lse, delta, blocks.bounds)

    def merge_rows(partial: Tensor, kv_start: int, kv_heads: int, row_start: int, rows: int) -> None:
        backward.merge_query_kernel[(triton.cdiv(rows, config["merge_query"].rows), kv_heads)](
            *tensors, blocks.of_token, choices, partial, d_query, scale * LOG2_E, kv_start, row_start, rows,
            sizes.tokens, sizes.kv_heads, LOG2_E=LOG2_E, NONE=none, **constants, **config["merge_query"].arguments(),
        )  # fmt: skip

    def key_value(lists: Lists | None, kv_start: int, kv_heads: int) -> None:
        tiles = triton.cdiv(block_size, config["key_value"].keys)
        offsets, entries = (lists.offsets, lists.entries) if lists else (blocks.bounds, blocks.bounds)
        backward.key_value_kernel[(count * kv_heads * tiles,)](
            *tensors, offsets, entries, d_key, d_value, scale * LOG2_E, kv_start, kv_heads, sizes.rows, count,
            lists.parts if lists else 1, sizes.kv_heads, LOG2_E=LOG2_E, TILES=tiles, **constants,
            **config["key_value"].arguments(),
        )  # fmt: skip

    if sizes.choose == 0:
        merge_rows(d_query, 0, sizes.kv_heads, 0, sizes.rows)
        key_value(None, 0, sizes.kv_heads)
        return d_query, d_key, d_value
    heads, tokens = _kv_heads_at_once(sizes, query.element_size())
    for kv_start, kv_heads, lists in _routed(choices, blocks, heads):
        key_value(lists, kv_start, kv_heads)
        for chunk in _chunks(lists, kv_start, kv_heads, sizes, tokens, config["query"].rows):
            entries = chunk.rows * sizes.choose
            partial = torch.empty(kv_heads * entries, sizes.head_dim, dtype=query.dtype, device=query.device)
            pointers, numbers = _list_arguments(chunk, sizes, count)
            backward.routed_query_kernel[(len(chunk.tiles.lists),)](
                *tensors, *pointers, partial, scale * LOG2_E, kv_start, chunk.row_start * sizes.choose, entries,
                sizes.rows, *numbers, LOG2_E=LOG2_E, B=block_size, **constants, **config["query"].arguments(),
            )  # fmt: skip
            merge_rows(partial, kv_start, kv_heads, chunk.row_start, chunk.rows)
            del partial  # before the next chunk's is made
    return d_query, d_key, d_value
