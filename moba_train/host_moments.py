"""AdamW whose moments lie in pinned host memory. The update runs on the device, on a piece of them at a time.

Of the 12 bytes a parameter of fp32 optimizer state, 8 leave the device; the numbers are those of torch's fused AdamW,
bit by bit, since its update of one number depends on no other. While a piece is updated, the next comes in and the one
before goes out, on streams of their own. DeepSpeed's offload has the update run on the CPU, with fp32 parameters and
gradients there too: 18 bytes and more.
"""

from __future__ import annotations

import mmap
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

MOMENTS = ("exp_avg", "exp_avg_sq")
PIECE = 1 << 25  # numbers: 134 MB of each moment
ROOMS = 3  # pieces on the device at a time: one comes in, one is updated, one goes out


class HostMomentAdamW(torch.optim.AdamW):
    """As ``torch.optim.AdamW(groups, fused=True, ...)``; ``step`` takes no closure.

    Args:
        groups: of parameters, all on one device and in fp32.
        piece: numbers that are updated at a time.
        settings: torch's.
    """

    def __init__(self, groups: Any, piece: int = PIECE, **settings: Any) -> None:
        super().__init__(groups, fused=True, **settings)
        self._piece = piece

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would bring the moments to the device. They are taken out of ``state_dict`` one by one, so
        that none is there twice."""
        states = state_dict["state"]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        moments = {}
        for number in numbers:
            for name in MOMENTS if number in states else ():
                moments[number, name] = on_host(states[number].pop(name), self._on_gpu())
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for (number, name), moment in moments.items():
            self.state[parameters[numbers.index(number)]][name] = moment

    def _on_gpu(self) -> bool:
        return any(parameter.is_cuda for group in self.param_groups for parameter in group["params"])

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state |= {name: zeros(parameter.shape, parameter.is_cuda) for name in MOMENTS}
        for name in MOMENTS:  # DeepSpeed's loaders set some themselves, on the device or not pinned
            if parameter.is_cuda and not state[name].is_pinned():
                state[name] = on_host(state[name], pinned=True)
        return state

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self._state(parameter)
        tensors = (parameter, gradient.contiguous(), *(state[name] for name in MOMENTS))
        pieces = list(zip(*(tensor.view(-1).split(self._piece) for tensor in tensors), strict=True))
        size = len(pieces[0][0])
        rooms = [_Room(parameter.device, size) for _ in range(min(ROOMS, len(pieces)))]
        inward, outward = _Lane(parameter.device), _Lane(parameter.device)
        rooms[0].fetch(pieces[0][2:], inward)
        for index, (numbers, slope, *moments) in enumerate(pieces):
            if index + 1 < len(pieces):
                rooms[(index + 1) % len(rooms)].fetch(pieces[index + 1][2:], inward)
            room = rooms[index % len(rooms)]
            first, second = room.present(len(numbers))
            _adamw(numbers, slope, first, second, state["step"], group)
            room.send(moments, outward)
        state["step"] += 1
        outward.finish()  # a checkpoint may read them next


def _adamw(
    numbers: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: Tensor, group: dict[str, Any]
) -> None:
    beta1, beta2 = group["betas"]
    adamw(
        [numbers],
        [gradient],
        [first],
        [second],
        [],
        [step.to(numbers.device, copy=True)],  # counted up by each call
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
    )


class _Lane:
    """A stream of copies; on a CPU they are done when they return."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def after(self, event: torch.cuda.Event | None) -> AbstractContextManager:
        if self.stream is None:
            return nullcontext()
        if event is not None:
            self.stream.wait_event(event)
        return torch.cuda.stream(self.stream)

    def finish(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()


class _Room:
    """Device memory for the moments of one piece after another."""

    def __init__(self, device: torch.device, size: int) -> None:
        self._moments = [torch.empty(size, device=device) for _ in MOMENTS]
        self._device = device
        # What was queued last: the memory above may have been another tensor's until then.
        self._done = self._mark()

    def fetch(self, moments: Any, lane: _Lane) -> None:
        with lane.after(self._done):
            for here, there in zip(self._moments, moments, strict=True):
                here[: len(there)].copy_(there, non_blocking=True)
            self._done = self._mark()

    def present(self, size: int) -> list[Tensor]:
        """The first ``size`` numbers of each moment, to be worked on in the current stream."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)
        return [moment[:size] for moment in self._moments]

    def send(self, moments: Any, lane: _Lane) -> None:
        with lane.after(self._mark()):
            for here, there in zip(self._moments, moments, strict=True):
                there.copy_(here[: len(there)], non_blocking=True)
            self._done = self._mark()

    def _mark(self) -> torch.cuda.Event | None:
        return torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None


def on_host(moment: Tensor, pinned: bool) -> Tensor:
    """A copy."""
    return zeros(moment.shape, pinned).copy_(moment)


def zeros(shape: torch.Size, pinned: bool) -> Tensor:
    """In fp32, in host memory. torch's own pinned memory would round each tensor's size up to a power of two."""
    if not pinned or not shape.numel():
        return torch.zeros(shape, dtype=torch.float32)
    return torch.frombuffer(_Pinned(4 * shape.numel()), dtype=torch.float32).view(shape)


class _Pinned(mmap.mmap):
    """Zeros that the GPU reads and writes by itself, as long as a tensor has them.

    Raises:
        ValueError: the machine does not let so much memory be pinned.
    """

    def __new__(cls, size: int) -> _Pinned:
        return super().__new__(cls, -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def __init__(self, size: int) -> None:
        self._cuda, self._address = torch.cuda.cudart(), 0
        with suppress(OSError):  # a kernel without them
            self.madvise(mmap.MADV_HUGEPAGE)  # fewer pages are pinned faster
        address = torch.frombuffer(self, dtype=torch.uint8).data_ptr()
        if code := int(self._cuda.cudaHostRegister(address, size, 0)):
            raise ValueError(
                f"train.offload.moments=true: {size / 1e9:.1f} GB more of host memory cannot be pinned (CUDA error "
                f"{code}): free some, raise `ulimit -l`, or spread the moments over more GPUs"
            )
        self._address = address

    def __del__(self) -> None:
        if self._address:
            self._cuda.cudaHostUnregister(self._address)
