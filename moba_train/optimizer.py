"""AdamW and its parameter groups.

torch's own AdamW, not DeepSpeed's FusedAdam or CPUAdam: it resumes to identical hashes on CPU and needs no compiler
(DeepSpeed accepts it under ZeRO through ``zero_allow_untested_optimizer``).
"""

from __future__ import annotations

import torch
from torch import nn

from moba_train.attention.key_conv import KeyConvolution
from moba_train.config import OptimizerConfig
from moba_train.host_moments import HostMomentAdamW


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; norms, biases, embeddings (tied output layers with them) and key convolutions, which are gains of
    single channels as norms are, do not."""
    kept_whole = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | KeyConvolution)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        # ZeRO-3 flattens partitioned parameters; ds_shape is their real shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (kept if len(shape) < 2 or id(parameter) in kept_whole else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, fused: bool, host_moments: bool = False
) -> torch.optim.AdamW:
    """The learning rate is set at every step by the schedule, so it starts at 0 here.

    Args:
        fused: update in one pass over parameters, gradients and moments: on a GPU, where the others' temporaries are
            as large as the parameters, and for state that is offloaded to the CPU.
        host_moments: the moments lie in host memory, whose update is always fused.
    """
    groups = parameter_groups(model, config.weight_decay)
    betas = (config.beta1, config.beta2)
    if host_moments:
        return HostMomentAdamW(groups, lr=0.0, betas=betas, eps=config.eps)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.eps, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
