"""Sequence parallelism: the ranks of a group share each row, through DeepSpeed's Ulysses (arXiv 2309.14509).

Each rank computes everything but attention on its own slice of a row. Around attention the slices of all heads are
exchanged for whole rows of some heads, and back: what ``hf_attention`` is given is a whole row, its segment bounds too,
so that every attention works as it is, packed documents included. Where there are fewer kv heads than ranks, they are
repeated.

DeepSpeed's engine is not told of the groups. Each rank has a share of the step's tokens, and a slice of a row is a
share as good as a row: ZeRO partitions over all ranks and gradients are averaged over all of them, which is what is
wanted. Told of them (``mpu``), it would divide differently by ZeRO stage and name its checkpoint files by model rank.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache
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
    # Imported late: it chooses DeepSpeed's accelerator, which ``build_engine`` settles first.
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    @cache  # its batch size is fixed, and a run has several: stages and the held-out rows
    def exchange(rows: int, heads: int, kv_heads: int, head_dim: int) -> nn.Module:
        return UlyssesSPAttentionHF(
            attn=attention_forward,
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
        return exchange(rows, heads, key.shape[1], head_dim)(module, query, key, value, attention_mask, **keywords)

    # DeepSpeed's own registration would put the exchange under "moba", for every model of this process, and fix one
    # batch size for all stages.
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, refuse_masks)
    model.set_attn_implementation(NAME)
