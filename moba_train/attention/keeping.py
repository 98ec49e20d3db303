"""What attention found in a forward pass, handed out again when activation checkpointing computes it a second time.

The gate's choices and attention's output cost much and are small. The backends hand what they compute through ``keep``;
outside of ``contexts`` that does nothing. It works below autograd, inside the operators: a gradient is computed from
what was kept as from what was computed. torch's selective checkpointing could do the same by the operators' names, but
sends every operator of a layer through Python for it, which takes longer than a small layer does.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

CHOICES, ATTENTION = "choices", "attention"

Result = TypeVar("Result")


class _Pass:
    """One checkpointed call: what is kept of it, by kind, in the order of the calls."""

    def __init__(self, kinds: frozenset[str]) -> None:
        self.kinds = kinds
        self.results: dict[str, deque[Any]] = defaultdict(deque)
        self.again = False


_PASS: ContextVar[_Pass | None] = ContextVar("pass", default=None)


def contexts(kinds: frozenset[str]) -> tuple[AbstractContextManager, AbstractContextManager]:
    """For the first and the second computation of one checkpointed call: ``torch.utils.checkpoint``'s context_fn."""
    one = _Pass(kinds)
    return _entered(one, again=False), _entered(one, again=True)


@contextmanager
def _entered(one: _Pass, again: bool) -> Iterator[None]:
    one.again = again
    token = _PASS.set(one)
    try:
        yield
    finally:
        _PASS.reset(token)


def keep(kind: str, compute: Callable[[], Result]) -> Result:
    """``compute()``, or what it gave the first time."""
    one = _PASS.get()
    if one is None or kind not in one.kinds:
        return compute()
    if one.again:
        return one.results[kind].popleft()
    result = compute()
    # Detached: the tensors that are returned become part of the graph, which would then hold itself.
    one.results[kind].append(tree_map_only(Tensor, Tensor.detach, result))
    return result


def keep_operator(name: str) -> AbstractContextManager:
    """Inside, the results of torch's own operators whose name starts with ``name`` pass through ``keep``."""
    one = _PASS.get()
    return nullcontext() if one is None or ATTENTION not in one.kinds else _Operators(name)


class _Operators(TorchDispatchMode):
    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not operator.name().startswith(self._name):
            return operator(*args, **(kwargs or {}))
        return keep(ATTENTION, lambda: operator(*args, **(kwargs or {})))
