"""Bytes that a GPU reads and writes outside products and attention: what bounds norms, SwiGLU, loss and optimizer.

Counted operator by operator on transformers' layer (plain torch) and read off Liger's kernels (fused).
"""

from __future__ import annotations

from moba_train.config import OffloadDevice
from moba_train.plan.setup import HALF, SINGLE, Setup


def layers(setup: Setup) -> float:
    """Of all layers in one micro-batch: forward, again where it is checkpointed, and backward."""
    h, m = setup.shape.hidden_size, setup.shape.mlp_size
    heads = setup.query_size + setup.shape.kv_heads * setup.shape.head_dim
    if setup.fused:
        # Forward: two norms, two residuals, rotation in place, SwiGLU. Backward: the same, and sums of the gradients of
        # what q, k, v and gate, up read.
        forward, backward = 20 * h + 6 * m + 4 * heads, 42 * h + 10 * m + 4 * heads
    else:
        forward, backward = 84 * h + 10 * m + 20 * heads, 214 * h + 18 * m + 32 * heads
    again = setup.train.activation_checkpointing
    token = (1 + again) * forward + backward
    return setup.shape.layers * (setup.tokens * token + _tiled_mlp(setup))


def _tiled_mlp(setup: Setup) -> float:
    """A layer's sums of three weights' gradients in fp32, read and written for every tile."""
    if not setup.train.mlp_tile_tokens:
        return 0.0
    tiles = -(-setup.tokens // setup.train.mlp_tile_tokens)
    return tiles * 3 * 2 * SINGLE * setup.shape.hidden_size * setup.shape.mlp_size


def loss(setup: Setup) -> float:
    """Passes over the logits and, for every tile, the sum of the output layer's gradient."""
    shape = setup.shape
    tiles = -(-setup.tokens // setup.train.loss_tile_tokens)
    matrix = shape.vocab_size * shape.hidden_size
    logits = (6.0 if setup.fused else 44.0) * setup.tokens * shape.vocab_size
    return logits + tiles * 2 * SINGLE * matrix


def partitioned(setup: Setup) -> float:
    """Of stage 3 in one micro-batch, beside what moves between GPUs: parameters gathered for both passes, through a
    buffer; gradients copied to a bucket, and a share of them added to fp32 sums."""
    if setup.train.zero_stage < 3:
        return 0.0
    count, share = setup.shape.parameters, setup.shape.parameters / setup.world_size
    return count * 3 * 2 * HALF + share * (HALF + 2 * SINGLE)


def update(setup: Setup) -> float:
    """Of a step: gradients added to sums, reduced, their norm and clipping; AdamW in one pass; parameters written.

    At stage 1 each rank does the former for all parameters.
    """
    count, share = setup.shape.parameters, setup.shape.parameters / setup.world_size
    elsewhere = setup.train.offload.optimizer is not OffloadDevice.none
    adamw = 0 if elsewhere else 7 * SINGLE
    return 60.0 * (count if setup.train.zero_stage == 1 else share) + adamw * share
