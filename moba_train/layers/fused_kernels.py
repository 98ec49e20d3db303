"""Liger's Triton kernels for a model's norms, rotary embedding and SwiGLU, on the instance: no library is patched.

Each computes in one pass what plain torch writes to memory several times over, and keeps less for the backward pass.
"""

from __future__ import annotations

import logging
import types
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from moba_train.config import FusedKernels
from moba_train.layers.tiled_mlp import gated_mlps

log = logging.getLogger(__name__)


def takes_fused_kernels(wanted: FusedKernels, device: torch.device) -> bool:
    """Whether a model on ``device`` gets them; ``auto`` logs why not on a GPU.

    Raises:
        ValueError: ``liger`` without a GPU or without the package.
    """
    if wanted is FusedKernels.none or (wanted is FusedKernels.auto and device.type != "cuda"):
        return False
    missing = next((name for name in ("liger_kernel", "triton") if find_spec(name) is None), None)
    if wanted is FusedKernels.liger and device.type != "cuda":
        raise ValueError(f"train.fused_kernels=liger on {device.type}: Liger's kernels need a GPU; set auto")
    if wanted is FusedKernels.liger and missing:
        raise ValueError(f"train.fused_kernels=liger and {missing} is not installed: pip install liger-kernel, or auto")
    if missing:
        log.info("fused kernels: none (%s is not installed: pip install liger-kernel)", missing)
    return missing is None


def fuse(model: nn.Module) -> None:
    """Give norms, SwiGLU and rotary embedding of a Llama-shaped ``model`` Liger's kernels, where their form fits."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    norms = [module for module in model.modules() if _is_rms_norm(module)]
    for norm in norms:
        norm.forward = partial(_rms_norm, norm)
    mlps = [module for module in gated_mlps(model) if _is_silu(module.act_fn)]
    for mlp in mlps:
        mlp.gated = LigerSiLUMulFunction.apply
        mlp.forward = partial(_swiglu, mlp)
    rotations = sum(_fuse_rotation(module) for module in model.modules() if hasattr(module, "layer_idx"))
    log.info("fused kernels: %d norms, %d SwiGLUs, %d rotary embeddings", len(norms), len(mlps), rotations)


def _is_rms_norm(module: nn.Module) -> bool:
    """Llama's form: the weight times the normalised input, with the norm in fp32."""
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _rms_norm(module: Any, hidden: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(hidden, module.weight, module.variance_epsilon)


def _is_silu(function: Any) -> bool:
    return type(function).__name__ in ("SiLU", "SiLUActivation")


def _swiglu(module: Any, hidden: Tensor) -> Tensor:
    return module.down_proj(module.gated(module.gate_proj(hidden), module.up_proj(hidden)))


def _fuse_rotation(module: Any) -> bool:
    """The attention's own forward pass with ``apply_rotary_pos_emb`` looked up in globals of its own.

    transformers calls that function by its module-level name, so that there is nothing on the instance to replace.
    """
    forward = type(module).forward
    if "apply_rotary_pos_emb" not in getattr(forward, "__code__", _fuse_rotation.__code__).co_names:
        return False
    scope = {**forward.__globals__, "apply_rotary_pos_emb": _rotate}
    changed = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    changed.__kwdefaults__ = forward.__kwdefaults__
    module.forward = types.MethodType(changed, module)
    return True


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.rope import LigerRopeFunction

    return LigerRopeFunction.apply(query, key, cos, sin)
