"""What is measured: sizes of one attention call, and the named ones with the speeds that are aimed at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moba_train.attention import AttentionSpec
from moba_train.cost import sparsity

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Times = tuple[float, float]  # of forward, and of forward + backward


@dataclass(frozen=True)
class Case:
    """Sequences of equal length, heads and blocks of one measurement.

    Args:
        length: tokens of a sequence.
        dtype: a key of ``DTYPES``.
        aims: times faster than dense attention that are aimed at on an H200, first and then; None for one's own sizes.

    Raises:
        ValueError: naming the size and the fix.
    """

    name: str
    sequences: int
    length: int
    heads: int
    kv_heads: int
    block_size: int
    top_k: int
    head_dim: int = 128
    dtype: str = "bf16"
    aims: tuple[Times, Times] | None = None

    def __post_init__(self) -> None:
        least = {"sequences": 1, "length": 2, "heads": 1, "kv_heads": 1, "block_size": 1, "top_k": 1, "head_dim": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                shown = "tokens" if name == "length" else name
                raise ValueError(f"{shown}={getattr(self, name)}: must be at least {minimum}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}: make it one")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype}: choose from {', '.join(DTYPES)}")

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec("moba", self.block_size, self.top_k)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def sparsity(self) -> float:
        return sparsity(self.block_size, self.top_k, self.length)

    def cu_seqlens(self, device: torch.device) -> Tensor:
        return torch.arange(self.sequences + 1, dtype=torch.int32, device=device) * self.length

    def tensors(self, device: torch.device) -> list[Tensor]:
        """query (T, H, D), key and value (T, K, D) with gradients, and the output's gradient: the same each time."""
        generator = torch.Generator(device).manual_seed(0)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        keywords: dict = {"device": device, "dtype": DTYPES[self.dtype], "generator": generator}
        tensors = [torch.randn(self.tokens, n, self.head_dim, **keywords) for n in heads]
        return [tensor.requires_grad_(i < 3) for i, tensor in enumerate(tensors)]


CASES = {
    case.name: case
    for case in (
        Case("c32k", 1, 32_768, 32, 8, 512, 3, aims=((4, 6), (8, 9))),
        Case("c64k", 2, 65_536, 16, 16, 128, 8, aims=((5, 7), (10, 12))),
        Case("c128k", 1, 131_072, 32, 8, 4096, 12, aims=((1.2, 1.15), (1.6, 1.4))),
        Case("c512k", 1, 524_288, 16, 16, 128, 8, aims=((30, 45), (60, 90))),
        Case("c1m", 1, 1_048_576, 4, 1, 4096, 12, aims=((8, 7), (12, 10))),
    )
}

# Sizes of one's own start from these; on a CPU they are also what is measured where nothing is named.
CUDA_SIZES = {"heads": 32, "kv_heads": 8, "head_dim": 128, "block_size": 512, "top_k": 3, "dtype": "bf16"}
CPU_SIZES = {"heads": 6, "kv_heads": 2, "head_dim": 32, "block_size": 256, "top_k": 3, "dtype": "fp32"}
CPU_LENGTHS = (2048, 4096, 8192, 16384, 32768)
