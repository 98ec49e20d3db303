"""Saved activations wait in host memory between the forward and the backward pass.

A tensor is copied out on a stream of its own while the forward pass goes on, and copied back one tensor ahead of the
backward pass. The host memory is pinned, kept from step to step, and taken in chunks: torch rounds each pinned
allocation up to a power of two, which would waste up to half of it.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 26
SMALLEST = 1 << 20  # bytes; what is smaller stays where it is


class HostMemory:
    """Chunks of host memory, handed out and taken back. Pinned where ``device`` is a GPU."""

    def __init__(self, device: torch.device, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes
        self._pinned = device.type == "cuda"
        self._free: list[Tensor] = []

    def take(self, size: int) -> list[Tensor]:
        """Chunks that hold ``size`` bytes together."""
        count = -(-size // self.chunk_bytes)
        return [self._free.pop() if self._free else self._chunk() for _ in range(count)]

    def give_back(self, chunks: list[Tensor]) -> None:
        self._free.extend(chunks)

    def _chunk(self) -> Tensor:
        return torch.empty(self.chunk_bytes, dtype=torch.uint8, pin_memory=self._pinned)


class _Kept:
    """One saved tensor: on the host, and on the device again once it was fetched."""

    def __init__(self, tensor: Tensor, offload: HiddenStateOffload) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.chunks = offload.memory.take(tensor.nbytes)
        self.fetched: Tensor | None = None
        self.ready: torch.cuda.Event | None = None
        self.before = offload.newest  # weak: the tensor that backward needs next
        # The graph is gone with this object. Copies of these chunks follow each other on one stream, so the next
        # tensor may have them at once.
        weakref.finalize(self, offload.memory.give_back, self.chunks)


class HiddenStateOffload(torch.autograd.graph.saved_tensors_hooks):
    """While this context is entered, large floating-point tensors that autograd saves go to the host.

    Args:
        device: where the tensors are. On a CPU they are copied too, without a stream.
        memory: where they go; None: pinned memory of its own.
        smallest: bytes of the smallest tensor that goes.
    """

    def __init__(self, device: torch.device, memory: HostMemory | None = None, smallest: int = SMALLEST) -> None:
        super().__init__(self._pack, self._unpack)
        self.memory = memory or HostMemory(device)
        self.newest: weakref.ref[_Kept] | None = None
        self._smallest = smallest
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _pack(self, tensor: Tensor) -> Any:
        if not tensor.is_floating_point() or tensor.nbytes < self._smallest:
            return tensor
        kept = _Kept(tensor, self)
        self.newest = weakref.ref(kept)
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        with self._copying(flat):
            for chunk, part in zip(kept.chunks, flat.split(self.memory.chunk_bytes), strict=True):
                chunk[: len(part)].copy_(part, non_blocking=True)
        return kept

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Kept):
            return packed
        self._fetch(packed)
        before = packed.before() if packed.before else None
        if before is not None:
            self._fetch(before)
        assert packed.fetched is not None
        tensor, packed.fetched = packed.fetched, None
        if packed.ready is not None:
            torch.cuda.current_stream(packed.device).wait_event(packed.ready)
        return tensor

    def _fetch(self, kept: _Kept) -> None:
        """Start the copy back to the device."""
        if kept.fetched is not None:
            return
        kept.fetched = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)
        flat = kept.fetched.flatten().view(torch.uint8)
        with self._copying(flat):
            for chunk, part in zip(kept.chunks, flat.split(self.memory.chunk_bytes), strict=True):
                part.copy_(chunk[: len(part)], non_blocking=True)
            if self._stream is not None:
                kept.ready = self._stream.record_event()

    def _copying(self, tensor: Tensor) -> Any:
        """The stream of the copies, once what was queued for ``tensor`` is done, its memory held until they are."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        tensor.record_stream(self._stream)
        return torch.cuda.stream(self._stream)
