"""A model → the engine that trains it, with every switch that saves memory or time."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from moba_train.config import Config, OffloadDevice
from moba_train.layers.fused_kernels import fuse, takes_fused_kernels
from moba_train.layers.tiled_mlp import tile_mlps
from moba_train.loss import TokenLosses
from moba_train.offload import HiddenStateOffload
from moba_train.optimizer import build_optimizer
from moba_train.parallel.engine import build_engine
from moba_train.recompute import checkpoint_activations
from moba_train.runtime import Runtime


def assemble(model: PreTrainedModel, config: Config, runtime: Runtime) -> Any:
    """
    Returns:
        deepspeed.DeepSpeedEngine around TokenLosses(model), on the runtime's device.

    Raises:
        ValueError: as ``with_switches``.
    """
    losses = with_switches(model, config, runtime)
    offload = config.train.offload
    in_one_pass = runtime.device.type == "cuda" or offload.optimizer is not OffloadDevice.none
    optimizer = build_optimizer(losses, config.optimizer, in_one_pass, offload.moments)
    return build_engine(losses, optimizer, config.train, runtime)


def with_switches(model: PreTrainedModel, config: Config, runtime: Runtime) -> TokenLosses:
    """The model and its loss, computed as ``config.train`` says.

    Raises:
        ValueError: a switch that the model or the device has no use for.
    """
    train = config.train
    fused = takes_fused_kernels(train.fused_kernels, runtime.device)
    if fused:
        fuse(model)
    if train.mlp_tile_tokens:
        tile_mlps(model, train.mlp_tile_tokens)
    if train.activation_checkpointing:
        offload = HiddenStateOffload(runtime.device) if train.offload.hidden_states else None
        checkpoint_activations(model, train.keep_attention, offload, train.keep_choices)
    return TokenLosses(model, train.loss_tile_tokens, fused)
