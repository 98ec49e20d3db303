"""Peak memory of one GPU: the largest of the moments at which a step can need most."""

from __future__ import annotations

from dataclasses import dataclass

from moba_train.plan import activations, states
from moba_train.plan.activations import HALF, SINGLE
from moba_train.plan.setup import Setup

GB = 1e9
CONTEXT_BYTES = 0.6 * GB  # CUDA, cuBLAS and the kernels' code, outside torch's allocator
COMMUNICATION_BYTES = 1.0 * GB  # NCCL's buffers, where there are several GPUs
FRAGMENTATION = 0.03  # of the peak: what the allocator holds and cannot use


@dataclass(frozen=True)
class Memory:
    """Bytes by part at each moment.

    Attributes:
        moments: name of a moment: its parts.
    """

    moments: dict[str, dict[str, float]]
    outside: float  # of torch's allocator

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """Of the peak."""
        return self.moments[self.peak_moment]

    @property
    def peak(self) -> float:
        """What ``torch.cuda.max_memory_allocated`` would say."""
        return sum(self.parts.values())

    @property
    def needed(self) -> float:
        """What the GPU must have."""
        return self.peak * (1 + FRAGMENTATION) + self.outside


def predict_memory(setup: Setup) -> Memory:
    """Of a step of the stage."""
    resting, passing = states.states(setup), states.buffers(setup)
    kept = _kept(setup)
    moments = {
        "loss": {**resting, **passing, **kept, **_loss(setup)},
        "backward pass of the last norm": {**resting, **passing, **kept, **_last_norm(setup)},
        "backward pass of a layer": {**resting, **passing, **kept, **_layer(setup)},
        "optimizer step": {**resting, **states.update(setup)},
    }
    outside = CONTEXT_BYTES + (COMMUNICATION_BYTES if setup.world_size > 1 else 0)
    return Memory(moments, outside)


def _kept(setup: Setup) -> dict[str, float]:
    """From the forward pass, all layers together."""
    tokens, layers = setup.tokens, setup.shape.layers
    # Cosines and sines of every position, ids, targets and positions.
    parts: dict[str, float] = {"inputs": tokens * (2 * HALF * setup.shape.head_dim + 3 * 8)}
    if setup.train.activation_checkpointing:
        parts["hidden states"] = tokens * layers * activations.hidden_state(setup)
    else:
        parts["activations"] = tokens * layers * activations.kept(setup)
    if chosen := sum(activations.choices(setup, spec) for spec in setup.specs):
        parts["choices"] = tokens * chosen
    return parts


def _loss(setup: Setup) -> dict[str, float]:
    """While the last tile's gradient is made: three fp32 tensors of its logits, and what the tiles before it left."""
    shape = setup.shape
    tile = min(setup.train.loss_tile_tokens, setup.tokens)
    return {
        "last norm": setup.tokens * activations.norm_kept(setup),
        "loss tile": 3 * SINGLE * tile * shape.vocab_size,
        "loss gradients": _head_gradient(setup) + setup.tokens * activations.hidden_state(setup),
    }


def _last_norm(setup: Setup) -> dict[str, float]:
    norm = setup.tokens * activations.last_norm_backward(setup)
    return {"last norm": norm, "loss gradients": _head_gradient(setup) if setup.shape.tied else 0.0}


def _layer(setup: Setup) -> dict[str, float]:
    """While the layer that needs most is computed backwards; one that was not checkpointed is kept already."""
    most = max(
        activations.mlp_backward(setup),
        activations.norm_backward(setup),
        *(activations.attention_backward(setup, spec) for spec in set(setup.specs)),
    )
    if not setup.train.activation_checkpointing:
        most -= activations.kept(setup)
    # A tied output layer's gradient waits for the embedding's, which is last.
    return {"layer": setup.tokens * most, "loss gradients": _head_gradient(setup) if setup.shape.tied else 0.0}


def _head_gradient(setup: Setup) -> float:
    """Tiles add up their gradients of the output layer in bf16 before the engine has them."""
    return HALF * setup.shape.vocab_size * setup.shape.hidden_size
