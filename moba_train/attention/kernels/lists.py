"""Who chose each block."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Lists:
    """Who chose each block, for some kv heads.

    Attributes:
        entries: (K * W * R,) int32; the entries e = w * R + r of each kv head, by (kv head, block), ascending. Those of
            kv head k start at k * W * R; where queries chose fewer than R blocks, the rest of its room stays unwritten.
        offsets: (kv_heads, P + 1, N) int32; the list of kv head k and block n is ``entries[offsets[k, 0, n] :
            offsets[k, P, n]]``, and the part of it whose queries lie in part p ``[offsets[k, p, n] :
            offsets[k, p + 1, n]]``.
        part_tokens: tokens of a part.
    """

    entries: Tensor
    offsets: Tensor
    part_tokens: int

    @property
    def blocks(self) -> int:
        """N."""
        return self.offsets.shape[2]

    @property
    def parts(self) -> int:
        """P."""
        return self.offsets.shape[1] - 1

    def of(self, kv_start: int, kv_heads: int) -> Lists:
        """The lists of some kv heads."""
        return replace(self, offsets=self.offsets[kv_start : kv_start + kv_heads])
