"""Optimizer state that DeepSpeed keeps in files (``train.offload.optimizer=nvme``), so that a run goes on from it.

With a checkpoint DeepSpeed 0.19.8 copies the files back to the disk, and forgets that moments are among them: AdamW
would begin with new ones, at step 0, without a word. State that is too small for files it leaves out of the checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch

from moba_train.host_moments import MOMENTS


def refuse_small_groups(engine: Any) -> None:
    """
    Raises:
        ValueError: a rank's share of a group of parameters is too small for DeepSpeed to keep in a file.
    """
    optimizer = engine.optimizer
    sizes = [int(size) for size in optimizer.fp16_partitioned_groups_flat_numel]
    small = [size for index, size in enumerate(sizes) if not optimizer._swappable_optimizer_subgroup(index)]
    if small:
        raise ValueError(
            f"train.offload.optimizer=nvme and a rank's share of a group of parameters is {min(small):,} numbers, "
            f"which DeepSpeed would leave out of its checkpoints (below 1 MB): set train.offload.optimizer=cpu"
        )


def restore_moments(engine: Any, folder: str, tag: str) -> None:
    """Let the optimizer know the moments whose files ``engine.load_checkpoint(folder, tag)`` has just put back."""
    optimizer = engine.optimizer
    # A pickle, as all of DeepSpeed's files: the checkpoint's manifest has vouched for it. Moments are empty in it.
    saved = torch.load(engine._get_zero_ckpt_name(folder, tag), map_location="cpu", weights_only=False)
    states = saved["optimizer_state_dict"]["optimizer_state_dict"]["state"]
    sizes = optimizer.fp16_partitioned_groups_flat_numel
    for index, parameter in enumerate(optimizer.fp32_partitioned_groups_flat):
        if index not in states:  # saved before the first step
            continue
        state = optimizer.optimizer.state[parameter]
        state["step"] = states[index]["step"]
        # DeepSpeed knows by its size that a tensor has a file; these are never read, nor is memory taken for them.
        state.update({name: torch.empty(int(sizes[index]), dtype=parameter.dtype) for name in MOMENTS})
        optimizer.optimizer_swapper._get_param_swap_info(parameter).release_memory()
