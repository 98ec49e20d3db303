"""Peak memory of a model's pass without memory: the real code on fake tensors, every storage counted while it lives."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators make inside it; ``peak`` is the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.at_peak: list[int] = []
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bound = 0  # of what lives now

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        results = function(*arguments, **(keywords or {}))
        given = {storage._cdata for storage in _storages((arguments, keywords))}  # views of what was there before
        for storage in _storages(results):
            if storage._cdata not in given:
                self._count(storage)
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._living and not self._living[key][0].expired():
            return
        self._living[key] = (StorageWeakRef(storage), storage.nbytes())
        self._bound += storage.nbytes()
        if self._bound > self.peak and (now := self.now()) > self.peak:
            self.peak = now
            self.at_peak = sorted((size for _, size in self._living.values()), reverse=True)

    def now(self) -> int:
        """Bytes that live at this moment."""
        self._living = {key: entry for key, entry in self._living.items() if not entry[0].expired()}
        self._bound = sum(size for _, size in self._living.values())
        return self._bound


def _storages(tree: object) -> list[torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta"]
    return [tensor.untyped_storage() for tensor in tensors]
