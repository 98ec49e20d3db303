"""Tile sizes of the kernels, and how the work is cut so that its workspace stays bounded.

Partial outputs (and, in backward, partial dQ) would be R times the queries. They live in a workspace that holds those
of one chunk: some kv heads and, where one kv head's do not fit, some of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
from torch import Tensor

from moba_train.attention.kernels.lists import Lists

WORKSPACE_SHARE = 0.5  # of the bytes of query, key, value, out and their gradients
WORKSPACE_FLOOR = 64 << 20  # bytes that are never worth a second chunk
FOLD_STAGES = 3  # partial results of a row tile on their way at a time
HOPPER_SHARED = 227 << 10
ENTRY_BYTES = 24  # of an entry besides its partial result: places in lists, log-sum-exps, delta

SORT_NUMBERS = 215 << 8  # of 4 bytes in Hopper's shared memory: counters of blocks by warp, and one for each entry
SORT_LEAST = 1 << 14  # entries; less leaves no runs


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


def sizes_of(query: Tensor, key: Tensor, lists: Lists | None, block_size: int) -> Sizes:
    """Of query (T, H, D) and key (T, K, D)."""
    tokens, heads, head_dim = query.shape
    choose = 0 if lists is None else lists.entries.numel() // (tokens * heads)
    return Sizes(tokens, key.shape[1], heads // key.shape[1], choose, head_dim, block_size)


@dataclass(frozen=True)
class Config:
    """Tile and pipeline of a kernel: BLOCK_M rows, BLOCK_N keys."""

    rows: int
    keys: int
    warps: int
    stages: int

    def arguments(self) -> dict[str, int]:
        return dict(BLOCK_M=self.rows, BLOCK_N=self.keys, num_warps=self.warps, num_stages=self.stages)


def shared_bytes(kernel: str, config: Config, row_bytes: int) -> int:
    """Shared memory of a kernel, ``row_bytes`` for each row and key: tiles that stay, and tiles on their way."""
    rows, keys, stages = config.rows, config.keys, config.stages
    if kernel in ("resident", "key_value", "key_value_query"):
        held, moving = 2 * keys + (kernel != "key_value") * rows, (1 if kernel == "resident" else 2) * rows
        count = held + stages * moving
    else:
        held = rows * (2 if "query" in kernel else 1)
        count = max(held + stages * 2 * keys, held + (FOLD_STAGES - 1) * rows if "merge" in kernel else 0)
    return count * row_bytes + (6 << 10 if kernel.startswith("key_value") else 2 << 10)  # and what is no tile


@cache
def configs(head_dim: int, block_size: int, shared: int = HOPPER_SHARED) -> dict[str, Config]:
    """Tiles by kernel, measured on Hopper: as large as its registers and shared memory allow. Where a multiprocessor
    has less than that, fewer stages and then smaller tiles.

    ``resident`` and ``key_value_query`` are there only where one key tile holds a block.

    Args:
        head_dim: D.
        block_size: B.
        shared: bytes of shared memory that a program may use.
    """
    block_keys = max(16, triton.next_power_of_2(block_size))
    if head_dim <= 64:
        table = {
            "forward": Config(128, 64, 8, 3),
            "merge": Config(64, 64, 4, 2),
            "query": Config(128, 64, 8, 3),
            "merge_query": Config(64, 64, 4, 2),
            "key_value": Config(128, 64, 4, 2),
        }
        single = {"resident": Config(128, block_keys, 8, 2), "key_value_query": Config(64, block_keys, 8, 3)}
        largest = 128
    elif head_dim <= 128:
        table = {
            "forward": Config(128, 128, 8, 3),
            "merge": Config(64, 64, 4, 2),
            "query": Config(128, 64, 8, 3),
            "merge_query": Config(64, 64, 4, 2),
            "key_value": Config(64, 128, 8, 3),
        }
        single = {"resident": Config(64, block_keys, 4, 2), "key_value_query": Config(64, block_keys, 8, 3)}
        largest = 128
    else:
        table = {
            "forward": Config(64, 32, 4, 2),
            "merge": Config(64, 32, 4, 1),
            "query": Config(64, 32, 4, 1),
            "merge_query": Config(64, 32, 4, 1),
            "key_value": Config(32, 32, 4, 1),
        }
        single = {"resident": Config(64, block_keys, 4, 1), "key_value_query": Config(32, block_keys, 4, 1)}
        largest = 32
    row_bytes = 2 * triton.next_power_of_2(head_dim)
    table = {kernel: replace(config, keys=min(config.keys, block_keys)) for kernel, config in table.items()}
    fitted = {kernel: _fit(kernel, config, row_bytes, shared) for kernel, config in table.items()}
    if block_keys <= largest:
        fitted |= {kernel: _fit(kernel, config, row_bytes, shared) for kernel, config in single.items()}
        if any(fitted[kernel].keys < block_keys for kernel in single):
            fitted = {kernel: config for kernel, config in fitted.items() if kernel not in single}
    return fitted


def _fit(kernel: str, config: Config, row_bytes: int, shared: int) -> Config:
    while shared_bytes(kernel, config, row_bytes) > shared:
        if config.stages > 1:
            config = replace(config, stages=config.stages - 1)
        elif config.rows > max(16, config.keys if kernel not in ("resident", "key_value_query") else 0):
            config = replace(config, rows=config.rows // 2)
        else:
            config = replace(config, keys=config.keys // 2)
    return config


@cache  # Triton asks the driver for clock rates along with it, which takes milliseconds
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program on ``device`` may use."""
    if device.type != "cuda":  # the interpreter
        return HOPPER_SHARED
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


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
    """Work whose partial results exist at one time: ``kv_heads`` heads from ``kv_start`` on, and of the tokens the
    parts ``part_start:part_stop``, which are ``rows`` rows of each head from ``row_start`` on."""

    kv_start: int
    kv_heads: int
    part_start: int
    part_stop: int
    row_start: int
    rows: int

    @property
    def parts(self) -> int:
        return self.part_stop - self.part_start


def sorting(blocks: int) -> tuple[int, int, int]:
    """(warps, counters of a warp, entries at most) of a program of ``hopper.route`` that sorts a part; no warps where
    the counters of so many blocks leave no room for the entries."""
    counters = max(256, triton.next_power_of_2(blocks))
    for warps in (8, 4):
        entries = SORT_NUMBERS - warps * counters
        if entries >= SORT_LEAST:
            return warps, counters, entries
    return 0, counters, 0
