"""The Triton kernel of ``cross_entropy``. Imported where there is a GPU (or Triton's interpreter).

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 16384  # logits a program holds at one time


def cross_entropy(logits: Tensor, targets: Tensor, ignore: int) -> Tensor:
    """Losses (T,) in fp32; ``logits`` (T, V), rows contiguous, become the gradient of the losses' sum."""
    tokens, vocabulary = logits.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    cross_entropy_kernel[(tokens,)](logits, targets, losses, logits.stride(0), vocabulary, ignore, block, num_warps=32)
    return losses


@triton.jit
def cross_entropy_kernel(p_logits, p_targets, p_losses, stride, V, ignore, BLOCK: tl.constexpr):
    i_token = tl.program_id(0).to(tl.int64)
    target = tl.load(p_targets + i_token)
    p_row = p_logits + i_token * stride
    valid = target != ignore
    seen = tl.where(valid, V, 0)  # without a target nothing is read, and zeros are written
    # First pass: maximum and sum of exponentials, running.
    highest = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        b_scores = tl.load(p_row + o_v, mask=o_v < seen, other=float("-inf")).to(tl.float32)
        now = tl.maximum(highest, tl.max(b_scores, 0))
        safe = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(highest - safe) + tl.sum(tl.exp(b_scores - safe), 0)
        highest = now
    lse = tl.where(valid, highest + tl.log(total), 0.0)
    own = tl.load(p_row + target, mask=valid, other=0.0).to(tl.float32)
    tl.store(p_losses + i_token, tl.where(valid, lse - own, 0.0))
    # Second pass: softmax, less one at the target.
    for start in range(0, V, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        b_scores = tl.load(p_row + o_v, mask=o_v < seen, other=float("-inf")).to(tl.float32)
        b_gradient = tl.exp(b_scores - lse) - tl.where(o_v == target, 1.0, 0.0)
        tl.store(p_row + o_v, tl.where(valid, b_gradient, 0.0).to(p_logits.dtype.element_ty), mask=o_v < V)
