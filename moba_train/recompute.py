"""Activation checkpointing of a Hugging Face model that keeps each layer's block choices.

A layer's activations are dropped after its forward pass and computed again in the backward pass, all but the choices
of the gate: they are small (one or two bytes an entry), cost a pass over all block means, and must be the same twice.
On request attention's output is kept too, which spares its second forward pass, and the layers' inputs, which are what
is left of a layer, wait in host memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moba_train.attention import keeping
from moba_train.offload import HiddenStateOffload


def checkpoint_activations(
    model: PreTrainedModel,
    keep_attention: bool = False,
    offload: HiddenStateOffload | None = None,
    keep_choices: bool = True,
) -> None:
    """From now on, training passes of ``model`` keep a layer's input and its choices, and recompute the rest.

    Args:
        keep_attention: keep attention's output and log-sum-exp as well (heads x (2 head_dim + 4) bytes a token and
            layer in bf16); the second forward pass of a layer then leaves attention out.
        offload: where the layers' inputs wait; None: on the device.
        keep_choices: False: choose again (heads x (top_k - 1) x 1 or 2 bytes a token and layer less). Blocks of 4,096
            tokens make that a thousandth of attention; the ``triton`` gate finds the same blocks again, bit by bit.
    """
    kept = {keeping.CHOICES: keep_choices, keeping.ATTENTION: keep_attention}
    kinds = frozenset(kind for kind, wanted in kept.items() if wanted)
    draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    keywords = {
        "use_reentrant": False,
        "context_fn": partial(keeping.contexts, kinds),
        "preserve_rng_state": draws,  # the generators' states are read and set for each layer
    }
    # transformers renamed it on the way; the old name warns where the new one exists.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=keywords)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)
    if offload is not None:
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = _offloaded(module._gradient_checkpointing_func, offload)


def _offloaded(checkpoint: Any, offload: HiddenStateOffload) -> Any:
    """Inside a checkpoint torch's own hooks hold what is saved: the ones around it see its inputs alone."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        with offload:
            return checkpoint(*arguments, **keywords)

    return call
