"""Segment bounds to blocks.

Every segment is cut into blocks of ``block_size`` tokens from its own start; its last block may be shorter. Segments
follow each other without gaps, and so do blocks: one list of bounds describes them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# The layers of a model cut the same bounds the same way; some twenty small operators each time.
_CUTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Blocks:
    """The blocks of all segments, in token order.

    Attributes:
        bounds: (N + 1,) int32; block n holds the tokens ``bounds[n]:bounds[n + 1]``. Blocks past the last real one are
            empty, at the end of the tokens.
        first: (N,) int32; the first block of block n's segment.
        of_token: (T,) int32; the block of each token. A query there may choose the blocks
            ``first[of_token[t]]`` up to, and without, ``of_token[t]``; all of them have full size.
    """

    bounds: Tensor
    first: Tensor
    of_token: Tensor


def cut(cu_seqlens: Tensor, block_size: int, tokens: int) -> Blocks:
    """Cut segments into blocks, on ``cu_seqlens``' device and without reading a value back from it.

    Args:
        cu_seqlens: (S + 1,) int32 segment bounds, from 0 to ``tokens``; equal neighbours are an empty segment.
        block_size: tokens of a block.
        tokens: T.

    Returns:
        Blocks with room for N = ``most_blocks``. On the CPU, where reading a value costs nothing, N is the real number.
        The same object for the same arguments, as long as they live.
    """
    # While torch.compile traces there is nothing to keep, and an inference tensor has no version that tells of changes.
    if torch.compiler.is_compiling() or cu_seqlens.is_inference():
        return _cut(cu_seqlens, block_size, tokens)
    known = _CUTS.setdefault(cu_seqlens, {})
    arguments = (block_size, tokens, cu_seqlens._version)
    if arguments not in known:
        known[arguments] = _cut(cu_seqlens, block_size, tokens)
    return known[arguments]


def most_blocks(cu_seqlens: Tensor, block_size: int, tokens: int) -> int:
    """The most blocks that so many segments can have, known from shapes alone."""
    # Not ``len``, which torch.compile takes for one number: another would be another graph.
    return tokens // block_size + cu_seqlens.shape[0] - 1


def _cut(cu_seqlens: Tensor, block_size: int, tokens: int) -> Blocks:
    segments = len(cu_seqlens) - 1
    starts = cu_seqlens[:-1].long()
    counts = (cu_seqlens.long().diff() + block_size - 1) // block_size
    ends = counts.cumsum(0)  # first block after each segment
    readable = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    room = int(ends[-1]) if readable else most_blocks(cu_seqlens, block_size, tokens)
    index = torch.arange(room + 1, device=cu_seqlens.device)
    segment = torch.searchsorted(ends, index, right=True).clamp_(max=segments - 1)  # skips empty segments
    first = (ends - counts)[segment]
    bounds = (starts[segment] + (index - first) * block_size).clamp_(max=tokens)
    of_token = torch.searchsorted(bounds[1:], torch.arange(tokens, device=cu_seqlens.device), right=True)
    return Blocks(bounds=bounds.int(), first=first[:-1].int(), of_token=of_token.int())
