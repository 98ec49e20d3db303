"""Tile sizes of the kernels, and how the work is cut so that its workspace stays bounded.

Partial outputs (and, in backward, partial dQ) would be R times the queries. They live in a workspace that holds those
of one chunk: some kv heads and, where one kv head's do not fit, some of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import triton
from torch import Tensor

from moba_train.attention.kernels.route import Lists

WORKSPACE_SHARE = 0.5  # of the bytes of query, key, value, out and their gradients
WORKSPACE_FLOOR = 64 << 20  # bytes that are never worth a second chunk
ENTRY_BYTES = 24  # of an entry besides its partial result: places in lists, log-sum-exps, delta


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
    """Of query (T, H, D), key (T, K, D) and choices (K, T, G, R)."""
    tokens, heads, head_dim = query.shape
    return Sizes(tokens, key.shape[1], heads // key.shape[1], choices.shape[-1], head_dim, block_size)


@dataclass(frozen=True)
class Config:
    """Tile and pipeline of a kernel: BLOCK_M rows, BLOCK_N keys."""

    rows: int
    keys: int
    warps: int
    stages: int

    def arguments(self) -> dict[str, int]:
        return dict(BLOCK_M=self.rows, BLOCK_N=self.keys, num_warps=self.warps, num_stages=self.stages)


def configs(head_dim: int, block_size: int) -> dict[str, Config]:
    """Tiles by kernel: as large as registers (255 a thread) and shared memory (227 KiB on Hopper) allow.

    ``resident`` and ``key_value_query`` exist where one key tile holds a block.
    """
    keys = max(16, triton.next_power_of_2(block_size))
    if head_dim <= 64:
        table = {
            "forward": Config(128, min(keys, 64), 8, 3),
            "resident": Config(128, keys, 8, 2),
            "merge": Config(64, min(keys, 64), 4, 2),
            "query": Config(128, min(keys, 64), 8, 3),
            "merge_query": Config(64, min(keys, 64), 4, 2),
            "key_value": Config(128, min(keys, 64), 4, 2),
            "key_value_query": Config(64, keys, 8, 3),
        }
        largest = 128
    elif head_dim <= 128:
        table = {
            "forward": Config(128, min(keys, 128), 8, 3),
            "resident": Config(64, keys, 4, 2),
            "merge": Config(64, min(keys, 64), 4, 2),
            "query": Config(128, min(keys, 64), 8, 3),
            "merge_query": Config(64, min(keys, 64), 4, 2),
            "key_value": Config(64, min(keys, 128), 8, 3),
            "key_value_query": Config(64, keys, 8, 3),
        }
        largest = 128
    else:
        table = {
            "forward": Config(64, min(keys, 32), 4, 2),
            "resident": Config(64, keys, 4, 1),
            "merge": Config(64, min(keys, 32), 4, 1),
            "query": Config(64, min(keys, 32), 4, 1),
            "merge_query": Config(64, min(keys, 32), 4, 1),
            "key_value": Config(32, min(keys, 32), 4, 1),
            "key_value_query": Config(32, keys, 4, 1),
        }
        largest = 32
    if keys > largest:
        del table["resident"], table["key_value_query"]
    return table


def chunk_size(sizes: Sizes, element: int) -> tuple[int, int]:
    """(kv heads, tokens) whose partial results, of ``element`` bytes a number, fit the workspace."""
    whole = 4 * (sizes.group + 1) * sizes.kv_heads * sizes.tokens * sizes.head_dim * element
    room = max(WORKSPACE_FLOOR, int(WORKSPACE_SHARE * whole))
    token = sizes.group * sizes.choose * (sizes.head_dim * element + ENTRY_BYTES)
    heads = min(sizes.kv_heads, max(1, room // (token * sizes.tokens)))
    heads = triton.cdiv(sizes.kv_heads, triton.cdiv(sizes.kv_heads, heads))
    return heads, min(sizes.tokens, max(1, room // token))


@dataclass(frozen=True)
class Chunk:
    """Parts ``part_start:part_stop`` of the tokens: ``rows`` rows of each kv head from ``row_start`` on."""

    part_start: int
    part_stop: int
    row_start: int
    rows: int


def chunks(lists: Lists, sizes: Sizes, tokens: int) -> Iterator[Chunk]:
    """Whole parts, about ``tokens`` tokens at a time."""
    step = lists.parts if tokens == sizes.tokens else max(1, tokens // lists.part_tokens)
    for part_start in range(0, lists.parts, step):
        part_stop = min(part_start + step, lists.parts)
        start = part_start * lists.part_tokens
        stop = min(part_stop * lists.part_tokens, sizes.tokens)
        yield Chunk(part_start, part_stop, start * sizes.group, (stop - start) * sizes.group)
