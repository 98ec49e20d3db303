"""Sequence parallelism: the ranks of a group share each row, through DeepSpeed's Ulysses (arXiv 2309.14509).

Each rank computes everything but attention on its own slice of a row. Around attention the slices of all heads are
exchanged for whole rows of some heads, and back: what ``hf_attention`` is given is a whole row, its segment bounds too,
so that every attention works as it is, packed documents included. Where there are fewer kv heads than ranks, they are
repeated.

The exchange is DeepSpeed's, all but its copies: those bring what arrives into transformers' order (heads before
tokens), which attention undoes, and move two bytes at a time. Here queries, keys and values are copied once, on their
way out, and attention's output once, when it is back; 131,072 tokens of a 1B model on two H200s: 18 ms a step in place
of 108.

DeepSpeed's engine is not told of the groups. Each rank has a share of the step's tokens, and a slice of a row is a
share as good as a row: ZeRO partitions over all ranks and gradients are averaged over all of them, which is what is
wanted. Told of them (``mpu``), it would divide differently by ZeRO stage and name its checkpoint files by model rank.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from moba_train.hf_attention import attention_forward, refuse_masks
from moba_train.runtime import Runtime

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "moba_ulysses"  # in transformers' interfaces, beside ``hf_attention.NAME``


def sequence_group(runtime: Runtime, timeout: timedelta) -> dist.ProcessGroup:
    """This rank's sequence-parallel group; all ranks call it."""
    size = runtime.sequence_parallel_size
    groups = [
        dist.new_group(list(range(first, first + size)), timeout=timeout)
        for first in range(0, runtime.world_size, size)
    ]
    return groups[runtime.data_parallel_rank]


def share_rows(model: PreTrainedModel, group: dist.ProcessGroup) -> None:
    """From now on, ``model`` takes slices of rows: rank i of ``group`` the i-th of equal contiguous slices.

    It must be called with ``position_ids`` and with the segment bounds of whole rows (``batch.model_inputs``).
    """

    @cache  # its batch size is fixed, and a run has several: stages and the held-out rows
    def exchange(rows: int, heads: int, kv_heads: int, head_dim: int) -> nn.Module:
        return _exchange_type()(
            attn=partial(_attend, head_dim),
            batch_size=rows,
            attn_head_count=heads,
            attn_head_size=head_dim,
            kv_head_count=kv_heads,
            num_hidden_layers=model.config.num_hidden_layers,
            process_group=group,
            seq_length_is_variable=True,
        )

    def forward(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **keywords: Any,
    ) -> tuple[torch.Tensor, None]:
        """``hf_attention.attention_forward`` of slices; (batch, length of the slice, heads * head_dim)."""
        rows, heads, _, head_dim = query.shape
        # DeepSpeed gathers them in every layer; the bounds say all that attention needs of them.
        keywords["position_ids"] = keywords["position_ids"][:, :1].contiguous()  # NCCL takes nothing else
        return exchange(rows, heads, key.shape[1], head_dim)(module, query, key, value, attention_mask, **keywords)

    # DeepSpeed's own registration would put the exchange under "moba", for every model of this process, and fix one
    # batch size for all stages.
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, refuse_masks)
    model.set_attn_implementation(NAME)


def _attend(
    head_dim: int,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """``hf_attention.attention_forward`` of (batch, 1, length, heads * head_dim): a rank's heads side by side."""
    query, key, value = (x.unflatten(-1, (-1, head_dim)).squeeze(1).transpose(1, 2) for x in (query, key, value))
    return attention_forward(module, query, key, value, attention_mask, **keywords)


@cache
def _exchange_type() -> type[nn.Module]:
    """Imported late: DeepSpeed's module chooses its accelerator, which ``build_engine`` settles first."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF, _dim_zero_all_to_all

    class Exchange(UlyssesSPAttentionHF):
        """Legend: n tokens of a slice, N of a row, R rows, P ranks, H heads, D head_dim."""

        def _combine_local_sequences(self, *slices: torch.Tensor) -> tuple[torch.Tensor, ...]:
            """(n, R, H, D) → (N, R, 1, H / P * D) of queries, keys and values."""
            return tuple(self._whole(part) for part in slices)

        def _whole(self, part: torch.Tensor) -> torch.Tensor:
            if (copies := self.world_size // part.shape[2]) > 1:
                part = part.repeat_interleave(copies, dim=2)
            parcels = _Moved.apply(part.reshape(*part.shape[:2], self.world_size, -1), 2, 0)
            arrived = _dim_zero_all_to_all(self.process_group, parcels)
            return arrived.flatten(0, 1).unsqueeze(2)

        def _partition_global_sequence(self, whole: torch.Tensor) -> torch.Tensor:
            """(N, R, H / P * D) → (n, R, H * D) of attention's output."""
            parcels = whole.unflatten(0, (self.world_size, -1))
            arrived = _dim_zero_all_to_all(self.process_group, parcels)
            return _Moved.apply(arrived, 0, 2).flatten(2)

    return Exchange


class _Moved(torch.autograd.Function):
    """A dimension moved, and all copied in that order, in words of 8 bytes where they fit: torch copies what is not
    contiguous a number at a time, and bf16 at a third of what memory can do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, source: int, destination: int) -> torch.Tensor:
        ctx.places = source, destination
        return _copy_moved(x, source, destination)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        source, destination = ctx.places
        return _copy_moved(gradient.contiguous(), destination, source), None, None


def _copy_moved(x: torch.Tensor, source: int, destination: int) -> torch.Tensor:
    numbers, places = 8 // x.element_size(), (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    fits = x.stride(-1) == 1 and not any(place % numbers for place in places)
    words = torch.int64 if fits else x.dtype
    return x.view(words).movedim(source, destination).contiguous().view(x.dtype)
