"""Activation checkpointing of a Hugging Face model that keeps each layer's block choices.

A layer's activations are dropped after its forward pass and computed again in the backward pass, all but the choices
of the gate: they are small (one or two bytes an entry), cost a pass over all block means, and must be the same twice.
"""

from __future__ import annotations

from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

_KEPT = {"moba_train::choose", "moba_train::varlen_choose"}  # the gate of the triton and of the varlen backend


def checkpoint_activations(model: PreTrainedModel) -> None:
    """From now on, training passes of ``model`` keep a layer's input and its choices, and recompute the rest."""
    keywords = {"use_reentrant": False, "context_fn": _contexts}
    # transformers renamed it on the way; the old name warns where the new one exists.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=keywords)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)


def _contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    # Not every operator that passes here has a name: higher-order ones do not.
    name = operator.name() if callable(getattr(operator, "name", None)) else ""
    return CheckpointPolicy.MUST_SAVE if name.split(".")[0] in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
