"""The implementations of attention by name, and why one refuses a case.

Every backend is a function ``(query, key, value, cu_seqlens, max_seqlen, spec, scale) -> out`` with the shapes of
``reference``. A new one is an entry here: the shared tests then cover it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from torch import Tensor
from torch.autograd import forward_ad

from moba_train.attention import adapters
from moba_train.attention.reference import reference
from moba_train.attention.spec import KINDS, AttentionSpec
from moba_train.attention.varlen import refuses as varlen_refuses
from moba_train.attention.varlen import varlen

log = logging.getLogger(__name__)

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor, int, AttentionSpec, float], Tensor]


@dataclass(frozen=True)
class Backend:
    """An implementation, a function that says why it cannot serve (query, key, spec), None if it can, and its kinds."""

    function: AttentionFunction
    refuses: Callable[[Tensor, Tensor, AttentionSpec], str | None]
    kinds: tuple[str, ...] = KINDS


def _triton(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, spec: AttentionSpec, scale: float
) -> Tensor:
    from moba_train.attention.kernels.op import triton_attention  # here: the package needs torch alone

    return triton_attention(query, key, value, cu_seqlens, max_seqlen, spec, scale)


def _triton_refuses(query: Tensor, key: Tensor, spec: AttentionSpec) -> str | None:
    if query.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a CUDA device, and query is on {query.device}"
    if find_spec("triton") is None:
        return "the triton package is not installed"
    from moba_train.attention.kernels.op import refuses

    return refuses(query, key, spec)


BACKENDS: dict[str, Backend] = {  # in the order in which `auto` tries them: none after `reference`
    "triton": Backend(_triton, _triton_refuses, kinds=("moba",)),
    "varlen": Backend(varlen, varlen_refuses),
    "reference": Backend(reference, lambda query, key, spec: None),
    "flash_moba": Backend(adapters.flash_moba, adapters.flash_moba_refuses, kinds=("moba",)),
    "moonshot": Backend(adapters.moonshot, adapters.moonshot_refuses, kinds=("moba",)),
}


def check_name(name: str) -> None:
    """
    Raises:
        ValueError: ``name`` is neither ``auto`` nor a backend; lists them.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend={name} is unknown: choose from auto, {', '.join(BACKENDS)}")


def resolve(name: str, query: Tensor, key: Tensor, spec: AttentionSpec) -> AttentionFunction:
    """The function that computes ``spec`` for tensors like ``query`` and ``key``.

    Args:
        name: a key of ``BACKENDS``, or ``auto`` for the first that does not refuse. ``auto`` logs what it took and why
            the ones before it refused, once for each distinct answer.
        query: (T, H, D); its device, type and shape decide, its values are not read.
        key: (T, K, D).
        spec: what to attend to.

    Raises:
        ValueError: an unknown name, or the named backend's reason to refuse. It never falls back silently.
    """
    if name == "auto":
        refusals: list[str] = []
        for candidate, backend in BACKENDS.items():
            reason = _reason(backend, query, key, spec)
            if reason is None:
                _log_choice(candidate, spec.kind, tuple(refusals))
                return backend.function
            refusals.append(f"{candidate}: {reason}")
        raise AssertionError("reference refuses nothing")
    check_name(name)
    reason = _reason(BACKENDS[name], query, key, spec)
    if reason is not None:
        raise ValueError(f"backend={name} cannot run here: {reason}; choose another, or auto")
    return BACKENDS[name].function


def _reason(backend: Backend, query: Tensor, key: Tensor, spec: AttentionSpec) -> str | None:
    # torch takes the tangent of an operator that has no rule for it as zero, without a word.
    if backend.function is not reference and forward_ad._current_level >= 0:
        return "it has no forward-mode derivatives (torch.func.jvp)"
    return backend.refuses(query, key, spec)


@cache
def _log_choice(name: str, kind: str, refusals: tuple[str, ...]) -> None:
    because = f" ({'; '.join(refusals)})" if refusals else ""
    log.info("attention %s: backend %s%s", kind, name, because)
