"""Activation checkpointing of a Hugging Face model that keeps each layer's block choices.

A layer's activations are dropped after its forward pass and computed again in the backward pass, all but the choices
of the gate: they are small (one or two bytes an entry), cost a pass over all block means, and must be the same twice.
On request attention's output is kept too, which spares its second forward pass, and the layers' inputs, which are what
is left of a layer, wait in host memory.
"""

from __future__ import annotations

from collections import defaultdict, deque
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from moba_train.offload import HiddenStateOffload

_CHOICES = frozenset({"moba_train::choose", "moba_train::varlen_choose"})  # the gate of the triton and varlen backends
_ATTENTION = frozenset(
    {
        "moba_train::attend",
        "moba_train::varlen_moba",
        "moba_train::varlen_full",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_flash_attention",
    }
)


def checkpoint_activations(
    model: PreTrainedModel, keep_attention: bool = False, offload: HiddenStateOffload | None = None
) -> None:
    """From now on, training passes of ``model`` keep a layer's input and its choices, and recompute the rest.

    Args:
        keep_attention: keep attention's output and log-sum-exp as well (heads x (2 head_dim + 4) bytes a token and
            layer in bf16); the second forward pass of a layer then leaves attention out.
        offload: where the layers' inputs wait; None: on the device.
    """
    kept = _CHOICES | _ATTENTION if keep_attention else _CHOICES
    keywords = {"use_reentrant": False, "context_fn": partial(_contexts, kept)}
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


def _contexts(kept: frozenset[str]) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    outputs: dict[Any, deque[Any]] = defaultdict(deque)
    return _Record(kept, outputs), _Replay(outputs)


class _Record(TorchDispatchMode):
    """Keeps what operators named ``kept`` return, in the order of their calls.

    torch's own selective contexts want the second pass to call every operator of the first, which it does not where
    ZeRO-3 gathers parameters in one pass and finds them gathered in the other.
    """

    def __init__(self, kept: frozenset[str], outputs: dict[Any, deque[Any]]) -> None:
        super().__init__()
        self._kept, self._outputs = kept, outputs

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        # Not every operator that passes here has a name: higher-order ones do not.
        name = operator.name() if callable(getattr(operator, "name", None)) else ""
        if name.split(".")[0] in self._kept:
            # Detached: what is returned becomes part of the graph, which would hold itself.
            self._outputs[operator].append(tree_map_only(Tensor, Tensor.detach, result))
        return result


class _Replay(TorchDispatchMode):
    """Returns what was kept in the place of a second call."""

    def __init__(self, outputs: dict[Any, deque[Any]]) -> None:
        super().__init__()
        self._outputs = outputs

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator in self._outputs:
            return self._outputs[operator].popleft()
        return operator(*args, **(kwargs or {}))
