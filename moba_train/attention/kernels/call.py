"""What the launches of one call share: its tensors, the kernels that serve them, and the chunks its work is cut into.

All tensors are contiguous; log-sum-exps are (K, W) fp32 in base 2.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from moba_train.attention.blocks import Blocks
from moba_train.attention.kernels.lists import Lists
from moba_train.attention.kernels.plan import Chunk, Config, Sizes, chunk_size, configs, shared_memory, sizes_of
from moba_train.attention.kernels.rows import LOG2_E
from moba_train.attention.kernels.tiles import tile

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """A forward or a backward pass.

    Attributes:
        query: (T, H, D); key and value: (T, K, D).
        blocks: of the segments.
        lists: of all kv heads; None where the own block is all that a query reads.
        sizes: of all these.
        configs: tiles of the Triton kernels, by name.
        hopper: the package of kernels for Hopper, where those are to run.
        scale: of the logits, in base 2.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    blocks: Blocks
    lists: Lists | None
    sizes: Sizes
    configs: dict[str, Config]
    hopper: Any
    scale: float

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: Blocks,
        lists: Lists | None,
        block_size: int,
        scale: float,
        *others: Tensor,
    ) -> Call:
        """``others``: tensors that the kernels for Hopper must be able to read too."""
        sizes = sizes_of(query, key, lists, block_size)
        table = configs(sizes.head_dim, block_size, shared_memory(query.device))
        hopper = hopper_kernels(block_size, query, key, value, *others)
        return cls(query, key, value, blocks, lists, sizes, table, hopper, scale * LOG2_E)

    def tuned(self, kernel: str) -> Any:
        """The module ``kernel`` of the package for Hopper, if that is to run and serves this head_dim."""
        module = getattr(self.hopper, kernel, None)
        return module if module is not None and self.sizes.head_dim in module.TILINGS else None

    def tuned_own(self, kernel: str) -> Any:
        """``tuned`` for one of the two kernels of the own block, which serve fewer sizes."""
        return self.tuned(kernel) if self.hopper is not None and self.hopper.own.serves(self.sizes) else None

    @property
    def everything(self) -> Chunk:
        """All of a call without lists, whose passes leave no partial results."""
        return Chunk(0, self.sizes.kv_heads, 0, 1, 0, self.sizes.rows)

    def head_groups(self) -> Iterator[tuple[Lists, int, int]]:
        """Some kv heads at a time, as their partial results fit the workspace: their lists, the first and how many."""
        assert self.lists is not None
        heads, _ = chunk_size(self.sizes, self.query.element_size())
        for start in range(0, self.sizes.kv_heads, heads):
            count = min(heads, self.sizes.kv_heads - start)
            yield self.lists.of(start, count), start, count

    def chunks(self, kv_start: int, kv_heads: int) -> Iterator[Chunk]:
        """Whole parts of the tokens, as many as fit the workspace."""
        assert self.lists is not None
        lists, sizes = self.lists, self.sizes
        _, tokens = chunk_size(sizes, self.query.element_size())
        step = lists.parts if tokens == sizes.tokens else max(1, tokens // lists.part_tokens)
        for part_start in range(0, lists.parts, step):
            part_stop = min(part_start + step, lists.parts)
            start = part_start * lists.part_tokens
            stop = min(part_stop * lists.part_tokens, sizes.tokens)
            yield Chunk(kv_start, kv_heads, part_start, part_stop, start * sizes.group, (stop - start) * sizes.group)

    def partial(self, chunk: Chunk) -> Tensor:
        """Room for a row of head_dim numbers for each entry of a chunk."""
        entries = chunk.kv_heads * chunk.rows * self.sizes.choose
        return torch.empty(entries, self.sizes.head_dim, dtype=self.query.dtype, device=self.query.device)

    def tiles(self, lists: Lists, chunk: Chunk, config: Config) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The arguments by which a routed kernel finds its tile: tensors, the tiles' lists first, and numbers."""
        entries = chunk.kv_heads * chunk.rows * self.sizes.choose
        tiles = tile(lists, chunk.part_start, chunk.part_stop, entries, config.rows)
        count = len(self.blocks.first)
        numbers = (chunk.kv_heads * count, count, lists.parts, chunk.part_start, chunk.parts, self.sizes.kv_heads)
        return (tiles.lists, tiles.of_list, lists.offsets, lists.entries), numbers


def hopper_kernels(block_size: int, *tensors: Tensor) -> Any:
    """``on_hopper``; None also for blocks that are not whole key tiles."""
    return None if block_size % 128 else on_hopper(*tensors)


def on_hopper(*tensors: Tensor) -> Any:
    """The package of kernels for Hopper; None elsewhere, and for tensors that the copy engine cannot read."""
    if not is_hopper(tensors[0].device):
        return None
    if any(tensor.data_ptr() % 16 for tensor in tensors):
        return None
    return _gluon_kernels()


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


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
