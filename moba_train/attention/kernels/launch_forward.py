"""The kernels of the forward pass in order, chunk by chunk.

Nothing is read back to the host: grids depend on shapes, or on bounds that hold whatever was chosen.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from moba_train.attention.blocks import Blocks
from moba_train.attention.kernels import forward, merge
from moba_train.attention.kernels.call import Call
from moba_train.attention.kernels.lists import Lists
from moba_train.attention.kernels.plan import FOLD_STAGES, Chunk


def attend(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, lists: Lists | None, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of every query to the blocks that list it, and to its own.

    Args:
        query: (T, H, D); key and value: (T, K, D).
        lists: None where the own block is all that a query reads.
        scale: of the logits, to base e.

    Returns:
        out (T, H, D) in query's type, and its log-sum-exp (K, W) fp32 in base 2.
    """
    call = Call.of(query, key, value, blocks, lists, block_size, scale)
    out = torch.empty_like(query)
    lse = torch.empty(call.sizes.kv_heads, call.sizes.rows, dtype=torch.float32, device=query.device)
    if lists is None:
        _merge(call, call.everything, out, lse, out, lse)  # R = 0: partial results are not read
        return out, lse
    for theirs, kv_start, kv_heads in call.head_groups():
        for chunk in call.chunks(kv_start, kv_heads):
            # The results go out of scope before the next chunk's are made.
            _merge(call, chunk, *_partial_outputs(call, theirs, chunk), out, lse)
    return out, lse


def _partial_outputs(call: Call, lists: Lists, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Output (entries, D) and log-sum-exp (entries,) of each of a chunk's entries."""
    sizes, block_size = call.sizes, call.sizes.block_size
    entries = chunk.rows * sizes.choose
    partial = call.partial(chunk)
    partial_lse = torch.empty(len(partial), dtype=torch.float32, device=partial.device)
    results = (partial, partial_lse, call.scale, chunk.kv_start, chunk.row_start * sizes.choose, entries)
    tensors = (call.query, call.key, call.value)
    if "resident" in call.configs:
        count, tuned = len(call.blocks.first), call.tuned("resident")
        listed = (
            call.blocks.bounds, lists.offsets, lists.entries, *results, count, lists.parts, chunk.part_start,
            chunk.parts, sizes.kv_heads,
        )  # fmt: skip
        programs = count * chunk.kv_heads
        if tuned is not None:
            tuned.launch(*tensors, *listed, programs=programs, sizes=sizes)
        else:
            forward.resident_forward_kernel[(programs,)](
                *tensors, *listed, B=block_size, **sizes.constants(), **call.configs["resident"].arguments()
            )
    elif (tuned := call.tuned("forward")) is not None:
        found, numbers = call.tiles(lists, chunk, tuned.TILINGS[sizes.head_dim])
        arguments = (call.blocks.bounds, *found, *results, *numbers)
        config = call.configs["forward"]
        tuned.launch(*tensors, *arguments, tiles=len(found[0]), config=config, sizes=sizes)
    else:
        found, numbers = call.tiles(lists, chunk, call.configs["forward"])
        forward.routed_forward_kernel[(len(found[0]),)](
            *tensors, call.blocks.bounds, *found, *results, *numbers, B=block_size, **sizes.constants(),
            **call.configs["forward"].arguments(),
        )  # fmt: skip
    return partial, partial_lse


def _merge(call: Call, chunk: Chunk, partial: Tensor, partial_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """Write ``out`` and ``lse`` of a chunk's rows: attention in the own block, merged with their partial outputs."""
    sizes, blocks, tuned = call.sizes, call.blocks, call.tuned_own("own_forward")
    arguments = (
        call.query, call.key, call.value, blocks.bounds, blocks.first, blocks.of_token, partial, partial_lse, out, lse,
        call.scale, chunk.kv_start, chunk.row_start, chunk.rows, sizes.tokens, sizes.kv_heads,
    )  # fmt: skip
    if tuned is not None:
        tuned.launch(*arguments, kv_heads=chunk.kv_heads, sizes=sizes)
        return
    config = call.configs["merge"]
    merge.merge_kernel[(triton.cdiv(chunk.rows, config.rows), chunk.kv_heads)](
        *arguments, FOLD_STAGES=FOLD_STAGES, **sizes.constants(), **config.arguments()
    )
