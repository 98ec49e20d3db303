"""The DeepSpeed engine of one rank.

The engine reduces gradients, keeps optimizer state (partitioned under ZeRO), clips and steps. Accumulation follows
from the step's tokens, so it changes with the stage, not with a setting.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import nn

from moba_train.config import OffloadConfig, OffloadDevice, Precision, TrainConfig
from moba_train.parallel import nvme
from moba_train.runtime import Runtime


def build_engine(module: nn.Module, optimizer: torch.optim.Optimizer, train: TrainConfig, runtime: Runtime):
    """Wrap ``module`` in a DeepSpeed engine, on the runtime's device.

    Returns:
        deepspeed.DeepSpeedEngine, accumulating nothing yet (``set_accumulation``).

    Raises:
        ValueError: as ``check_disk`` and ``nvme.refuse_small_groups``.
    """
    deepspeed = _deepspeed(runtime)
    check_disk(train.offload)
    if train.zero_stage == 3 and (tiled := {type(part) for part in module.modules() if hasattr(part, "tiled")}):
        # A tiled MLP works with its three matrices itself: they are to be gathered with it, not one by one.
        deepspeed.utils.set_z3_leaf_modules(module, list(tiled))
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # a page of memory figures, with bf16
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=engine_config(train, runtime))
    if train.offload.optimizer is OffloadDevice.nvme:
        nvme.refuse_small_groups(engine)
    return engine


@contextmanager
def loading_in_parts(train: TrainConfig, runtime: Runtime) -> Iterator[None]:
    """While this is entered and ZeRO is at stage 3, transformers' ``from_pretrained`` leaves each rank its own share of
    every parameter, on the runtime's device or where ``train.offload.parameters`` says."""
    if train.zero_stage < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    _deepspeed(runtime)
    check_disk(train.offload)
    seen = HfDeepSpeedConfig(engine_config(train, runtime))  # transformers looks at it for as long as it is there
    try:
        yield
    finally:
        del seen


def _deepspeed(runtime: Runtime) -> Any:
    """The library, imported for the runtime's device."""
    os.environ.setdefault("LOCAL_RANK", str(runtime.local_rank))
    if runtime.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # the accelerator is chosen at import
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # again: its import has set it
    # On CPUs DeepSpeed would compile a shared-memory collective for inference, and fail where there is no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def check_disk(offload: OffloadConfig) -> None:
    """
    Raises:
        ValueError: nvme without a folder to write to, or without what DeepSpeed compiles its writing with.
    """
    if OffloadDevice.nvme not in (offload.optimizer, offload.parameters):
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if offload.nvme_path is None or not os.access(offload.nvme_path, os.W_OK):
        raise ValueError(f"train.offload.nvme_path={offload.nvme_path} is no folder that can be written to: name one")
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError(
            "train.offload with nvme needs libaio and its headers, and a C++ compiler, on every node: install "
            "libaio-dev, or set train.offload.optimizer=cpu"
        )
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if not all(re.fullmatch(r"\d+\.\d+(\+PTX)?", each) for each in architectures.replace(";", " ").split()):
        raise ValueError(
            f"TORCH_CUDA_ARCH_LIST={architectures} with train.offload on nvme: DeepSpeed compiles a part for that, and "
            f"takes plain numbers alone; set it to a number such as 9.0, or unset it"
        )


def engine_config(train: TrainConfig, runtime: Runtime) -> dict:
    """DeepSpeed's configuration. It counts batches in micro-batches, since rows and their length vary by stage."""
    config: dict = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": runtime.world_size,
        "bf16": {"enabled": train.precision is Precision.bf16},
        "zero_allow_untested_optimizer": True,  # torch's AdamW, see optimizer.py
        "zero_force_ds_cpu_optimizer": False,  # torch's has a fused CPU step too, and needs no compiler
        "communication_data_type": _reduction_dtype(train, runtime).value,
        "gradient_clipping": 0.0 if _clips_itself(train) else train.gradient_clipping,
        "steps_per_print": 10**9,
    }
    if train.precision is Precision.bf16:
        # DeepSpeed's default, bf16 sums of bf16 gradients, loses 1 % of the gradient over 64 micro-batches.
        config["data_types"] = {"grad_accum_dtype": train.gradient_dtype.value}
    if train.zero_stage:
        config["zero_optimization"] = {"stage": train.zero_stage, **_offload(train.offload)}
    return config


def _reduction_dtype(train: TrainConfig, runtime: Runtime) -> Precision:
    if train.reduction_dtype is not None:
        return train.reduction_dtype
    # A single process under ZeRO-1 has nothing to send: its fp32 sums would be rounded to bf16 and back for nothing.
    return train.gradient_dtype if runtime.world_size == train.zero_stage == 1 else train.precision


def _offload(offload: OffloadConfig) -> dict:
    """ZeRO's part of an offload: where fp32 state and, at stage 3, parameters wait."""
    devices = {"offload_optimizer": offload.optimizer, "offload_param": offload.parameters}
    return {
        key: {"device": device.value, **({"nvme_path": offload.nvme_path} if device is OffloadDevice.nvme else {})}
        for key, device in devices.items()
        if device is not OffloadDevice.none
    }


def set_accumulation(engine, micro_batches: int) -> None:
    """From the next step on, a step is ``micro_batches`` passes a rank."""
    engine.set_train_batch_size(micro_batches * engine.dp_world_size)
    # DeepSpeed takes its count of all passes modulo this number: without a new count, the first steps after a change
    # would end in their middle.
    engine.micro_steps = 0


def backward(engine, loss: torch.Tensor) -> None:
    """Add the gradients of ``loss``, an output of the engine's forward pass, to those of the step, as they are."""
    # DeepSpeed divides the gradients of the module's own outputs by the number of passes, unless they are reached
    # through another tensor. A loss that is not finite may have gradients that are: they become NaN, on all ranks once
    # reduced, so that the step is skipped as one with such gradients is.
    sound = torch.where(loss.detach().isfinite(), 1.0, math.nan)
    engine.backward(loss * sound, scale_wrt_gas=False)


def step_engine(engine, train: TrainConfig) -> float:
    """End a micro-batch; at the last of a step, clip and update.

    Returns:
        The global gradient norm before clipping at the step's end, NaN before that. Where it is not finite, which it
        is on all ranks or on none, parameters and moments stay as they were.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return math.nan
    if _clips_itself(train):
        limit = train.gradient_clipping or math.inf
        norm = float(nn.utils.clip_grad_norm_(engine.module.parameters(), limit))
        if math.isfinite(norm):
            engine.step()
        else:
            engine.zero_grad()
            engine.micro_steps += 1
    else:
        engine.step()  # skips the update itself where the norm is not finite
        norm = float(engine.get_global_grad_norm())
        if not math.isfinite(norm) and train.zero_stage in (1, 2):
            _drop_sums(engine.optimizer)
    return norm


def _drop_sums(optimizer) -> None:
    """Forget the gradients of a skipped step. DeepSpeed does so unless the update runs on the CPU (seen with 0.19.8):
    there NaN would stay in the fp32 sums, and with it every later step would be skipped."""
    for sums in (getattr(optimizer, "averaged_gradients", {}), getattr(optimizer, "all_grad_tensors", {})):
        sums.update(dict.fromkeys(sums))


def _clips_itself(train: TrainConfig) -> bool:
    """Plain fp32 without ZeRO: DeepSpeed clips there but does not tell the norm, so it is done here."""
    return train.zero_stage == 0 and train.precision is Precision.fp32
