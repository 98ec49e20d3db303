"""The optimizer step: its size, arithmetic, and what saves memory or time in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Precision(Enum):
    """Arithmetic of the model's forward and backward pass; optimizer state is fp32 in both."""

    fp32 = "fp32"
    bf16 = "bf16"


class OffloadDevice(Enum):
    """Where optimizer state or parameters wait: on the GPU (``none``), in host memory or on a disk."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class FusedKernels(Enum):
    """Norms, rotary embedding and SwiGLU in Liger's Triton kernels, and cross entropy in one of this package. ``auto``:
    on CUDA, where liger-kernel is installed; ``liger``: there, and refused elsewhere; ``none``: in plain torch."""

    auto = "auto"
    liger = "liger"
    none = "none"


@dataclass
class OptimizerConfig:
    """AdamW (torch.optim.AdamW). Norms, biases, embeddings and key convolutions are not decayed."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclass
class OffloadConfig:
    """What waits outside the GPU's memory while it is not needed; each costs its transfers."""

    optimizer: OffloadDevice = OffloadDevice.none  # fp32 parameters and moments; the update runs on the CPU
    parameters: OffloadDevice = OffloadDevice.none  # needs zero_stage=3
    nvme_path: str | None = None  # a folder on the disk, for nvme
    moments: bool = False  # AdamW's, in pinned host memory; the update runs on the GPU, a piece at a time
    hidden_states: bool = False  # the inputs of checkpointed layers, in pinned host memory


@dataclass
class TrainConfig:
    """One optimizer step and how it is computed."""

    tokens_per_step: int = 16384  # over all ranks; accumulation follows from it
    micro_batch_tokens: int | None = None  # in one pass of a sequence-parallel group, at least one row; None: one row
    sequence_parallel_size: int = 1  # neighbouring ranks that share each row (Ulysses), each with a slice of it
    precision: Precision = Precision.fp32
    zero_stage: int = 0
    gradient_clipping: float = 1.0  # global norm; 0: off
    activation_checkpointing: bool = False  # keep each layer's input and gate choices, compute the rest again
    keep_choices: bool = True  # false: the gate is computed again too, where it is cheap and memory is dear
    keep_attention: bool = False  # of what is computed again, leave out attention: its output is kept, as large as q
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    loss_tile_tokens: int = 2048  # tokens whose logits exist at one time
    mlp_tile_tokens: int = 0  # tokens whose MLP activations exist at one time; 0: all
    gradient_dtype: Precision = Precision.fp32  # in which gradients of micro-batches add up; bf16 loses small ones
    reduction_dtype: Precision | None = None  # in which ranks add up gradients; None: as train.precision
    fused_kernels: FusedKernels = FusedKernels.auto
    nonfinite_limit: int = 5  # steps in a row skipped for a loss or gradient that is not finite, which end the run
    log_every: int = 1  # steps
    profile_steps: list[int] = field(default_factory=list)  # [first, last] to trace into <run>/profile, counted from 1
