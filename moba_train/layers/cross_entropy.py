"""Cross entropy of a tile of tokens and its gradient by the logits, at once.

On CUDA one Triton kernel reads the logits twice and writes the gradient over them, where plain torch makes some eight
passes in fp32. A loss is fp32 whatever the logits are, since losses are read by position, not only summed up.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

IGNORE = -100  # transformers' label of a position without a target


def losses_and_gradient(logits: Tensor, targets: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    """
    Args:
        logits: (tokens, vocabulary); may be written over.
        targets: (tokens,) int64, -100 where there is none.
        fused: by the Triton kernel, on CUDA.

    Returns:
        Losses (tokens,) in fp32 nats, 0 where the target is -100, and the gradient of their sum by the logits, in the
        logits' type and shape.
    """
    if fused and logits.is_cuda and find_spec("triton"):
        from moba_train.layers.cross_entropy_kernel import cross_entropy

        return cross_entropy(logits, targets, IGNORE), logits
    valid = targets != IGNORE
    at = targets.where(valid, 0)[:, None]
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse = scores.logsumexp(1, keepdim=True)
    losses = (lse - scores.gather(1, at)).squeeze(1).where(valid, 0)
    gradient = (scores - lse.where(valid[:, None], torch.inf)).exp_()  # a row of zeros without a target
    gradient.scatter_add_(1, at, -valid[:, None].to(gradient.dtype))
    return losses.to(torch.float32), gradient.to(logits.dtype)
