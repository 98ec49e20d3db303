"""Peak memory of one GPU: the largest of the moments at which a step can need most."""

from __future__ import annotations

from dataclasses import dataclass

from moba_train.plan import activations, states
from moba_train.plan.setup import HALF, SINGLE, Setup
from moba_train.plan.states import Parts

GB = 1e9
CONTEXT_BYTES = 1.8 * GB  # CUDA, NCCL and the kernels' code, outside torch's allocator
COMMUNICATION_BYTES = 1.0 * GB  # NCCL's buffers, where there are several GPUs; not measured
CUBLAS_BYTES = 2 * 32 << 20  # workspaces of cuBLAS and cuBLASLt, in torch's allocator
FRAGMENTATION = 0.03  # of the peak: what the allocator holds and cannot use
OFFLOADED_LAYERS = 2  # inputs of layers that are on the GPU at a time where they wait on the host


@dataclass(frozen=True)
class Memory:
    """Bytes by part at each moment.

    Attributes:
        moments: name of a moment: its parts.
        outside: of torch's allocator.
        host: of host memory, for this GPU.
    """

    moments: dict[str, Parts]
    outside: float
    host: float

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Parts:
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
    always = states.resting(setup) | _inputs(setup) | {"cuBLAS": CUBLAS_BYTES}
    gathered, everything = states.gathered(setup), setup.shape.parameters
    begin = always | gathered | states.gradients(setup, 0)
    after_loss = always | gathered | states.bucket(setup) | states.gradients(setup, setup.output_parameters)
    after_layers = after_loss | states.gradients(setup, everything - setup.input_parameters)
    end = after_loss | states.gradients(setup, everything)
    kept = _kept(setup, setup.shape.layers)
    moments = {
        "loss": begin | kept | _loss(setup),
        "backward pass of the last norm": after_loss | kept | _last_norm(setup),
        "backward pass of the last layer": after_loss | kept | _layer(setup),
        "backward pass of the first layer": after_layers | _kept(setup, 1) | _layer(setup),
        "gradient reduction": end | states.reduction(setup),
        "optimizer step": always | states.gradients(setup, everything) | states.update(setup),
    }
    moments = {name: {part: size for part, size in parts.items() if size} for name, parts in moments.items()}
    outside = CONTEXT_BYTES + (COMMUNICATION_BYTES if setup.world_size > 1 else 0)
    return Memory(moments, outside, states.on_host(setup) + _hidden_states_on_host(setup))


def _inputs(setup: Setup) -> Parts:
    """Cosines and sines of every position, ids, targets, positions, and losses."""
    return {"inputs": setup.tokens * (2 * HALF * setup.shape.head_dim + 3 * 8 + SINGLE)}


def _kept(setup: Setup, layers: int) -> Parts:
    """From the forward pass, of the first layers."""
    tokens, train = setup.tokens, setup.train
    choices = [activations.choices(setup, spec) for spec in setup.specs[:layers]]
    # Not kept, there are those of the layer that is computed again.
    parts: Parts = {"choices": tokens * (sum(choices) if train.keep_choices else max(choices))}
    if not train.activation_checkpointing:
        return parts | {"activations": tokens * layers * activations.kept(setup)}
    here = min(layers, OFFLOADED_LAYERS) if train.offload.hidden_states else layers
    parts["hidden states"] = tokens * here * activations.hidden_state(setup)
    if train.keep_attention:
        parts["attention outputs"] = tokens * layers * activations.output_kept(setup)
    return parts


def _hidden_states_on_host(setup: Setup) -> float:
    if not setup.train.offload.hidden_states:
        return 0.0
    return setup.tokens * setup.shape.layers * activations.hidden_state(setup)


def _loss(setup: Setup) -> Parts:
    """While the last tile is computed; the gradients of the hidden states of those before it wait.

    Gradients come with the losses, the output layer's in fp32: a fused kernel writes a tile's over its logits, and
    plain torch makes two fp32 tensors beside logits and gradient. At the end, when the last tile is gone, the sum is
    made in bf16.
    """
    tile = min(setup.train.loss_tile_tokens, setup.tokens) * setup.shape.vocab_size
    matrix = setup.embedding_parameters
    inside = HALF if setup.fused else 2 * (HALF + SINGLE)
    return {
        "last norm": setup.tokens * activations.norm_kept(setup),
        "loss tile": max(inside * tile, HALF * matrix),
        "loss gradients": SINGLE * matrix + setup.tokens * activations.hidden_state(setup),
    }


def _last_norm(setup: Setup) -> Parts:
    return {
        "last norm": setup.tokens * activations.last_norm_backward(setup),
        "loss gradients": _output_layer_gradient(setup),
    }


def _layer(setup: Setup) -> Parts:
    """While a layer is computed backwards; one that was not checkpointed is kept already."""
    within_mlp = setup.tokens * activations.mlp_backward(setup) + activations.mlp_fixed(setup)
    others: list[float] = [activations.norm_backward(setup)]
    others += [activations.attention_backward(setup, spec) for spec in set(setup.specs)]
    mlp_gradients = 3 * HALF * setup.shape.hidden_size * setup.shape.mlp_size
    most = max(within_mlp, setup.tokens * max(others) + mlp_gradients)
    if not setup.train.activation_checkpointing:
        most -= setup.tokens * activations.kept(setup)
    elif setup.train.keep_attention:
        most -= setup.tokens * activations.output_kept(setup)
    return {"layer": most, "loss gradients": _output_layer_gradient(setup)}


def _output_layer_gradient(setup: Setup) -> float:
    """A tied one waits for the embedding's, which is last; another is a parameter's gradient like others."""
    return HALF * setup.embedding_parameters if setup.shape.tied else 0.0
