"""Optional depthwise causal convolution on keys (FlashMoBA, arXiv 2511.11571).

Neighbouring tokens' keys learn to point the same way, so that the mean key of a block stands out to the queries that
look for one of its tokens: the gate then finds blocks more often. For each channel c of the key projection's output

    key'[t, c] = key[t, c] + SiLU(sum over lag < width of weight[c, lag] * key[t - lag, c])

without the terms whose token lies before t's segment. The weights start at 0, where SiLU is 0 and its slope is not: a
pretrained model's outputs are unchanged at first, and gradients flow from the first step.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu


class KeyConvolution(nn.Module):
    """A residual convolution over the tokens of each segment, channel by channel.

    Attributes:
        weight: (channels, width); ``weight[c, lag]`` is for the token ``lag`` places before.
    """

    def __init__(self, channels: int, width: int, dtype: torch.dtype | None = None) -> None:
        """
        Args:
            channels: kv_heads * head_dim; channel c belongs to kv head c // head_dim.
            width: tokens that a key is made of, its own included; 3 or 5 in the paper.
            dtype: of the weights, that of the keys.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, width, dtype=dtype))

    def forward(self, key: Tensor, cu_seqlens: Tensor) -> Tensor:
        """
        Args:
            key: (..., channels) of T tokens in all, before RoPE (and before a norm on keys, where a model has one).
            cu_seqlens: (segments + 1,) int32 bounds over the T tokens, ending at T.

        Returns:
            Like ``key``, in its type.
        """
        tokens = key.reshape(-1, key.shape[-1])
        place = places(cu_seqlens, len(tokens))[:, None]
        mixed = tokens * self.weight[:, 0]
        for lag in range(1, self.weight.shape[1]):
            earlier = tokens[:-lag] * self.weight[:, lag]
            mixed[lag:] += torch.where(place[lag:] >= lag, earlier, 0)
        return key + silu(mixed).view_as(key)


def places(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(tokens,) int64, each token's place in its segment, from 0. Reads nothing back from the device."""
    index = torch.arange(tokens, device=cu_seqlens.device)
    segment = torch.searchsorted(cu_seqlens.long(), index, right=True) - 1  # the last of equal bounds: none is empty
    return index - cu_seqlens.long()[segment]
