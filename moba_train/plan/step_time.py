"""Seconds of an optimizer step, from operations and bytes over the rates that kernels reach."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from moba_train.attention.spec import AttentionSpec
from moba_train.cost import full_keys, gate_scores, moba_keys
from moba_train.plan import communication, offload, traffic
from moba_train.plan.activations import chosen
from moba_train.plan.hardware import GB_S, Hardware
from moba_train.plan.setup import HALF, Setup

TFLOPS = 1e12

# How much longer an operation takes forward and backward with heads of 64 numbers: the exponentials stay as many.
HEAD_DIM_64 = {"full": (1.25, 1.27), "moba": (1.27, 1.2)}

# What the host needs to start the operators of a layer or of a tile of the loss, in eager mode: small models wait. All
# wait between steps, when losses and the gradient's norm are read.
HOST_SECONDS = {"forward": 0.6e-3, "backward": 1.2e-3, "tile": 0.4e-3, "step": 15e-3}

WAITING = "waiting for the host"


@dataclass(frozen=True)
class StepTime:
    """Seconds by part; the parts follow each other, what overlaps is taken out before."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def predict_time(setup: Setup, hardware: Hardware) -> StepTime:
    """Of a step of the stage."""
    once = _compute(setup, hardware)
    compute = sum(once.values())
    moved = communication.collective_seconds(setup, hardware, communication.pass_bytes(setup))
    if setup.train.zero_stage == 3:  # gathers and reductions run beside the arithmetic
        moved = max(0.0, moved - compute)
    once["ZeRO"] = moved + traffic.partitioned(setup) / (hardware.hbm_gbs * GB_S)
    once["Ulysses"] = _passes(setup) * setup.shape.layers * communication.exchange_seconds(setup, hardware)
    # Copies of pinned memory run beside the arithmetic, others do not.
    once["offload"] = max(0.0, offload.hidden_state_seconds(setup, hardware) - compute)
    once["offload"] += offload.parameter_seconds(setup, hardware)
    parts = {name: seconds * setup.micro_batches for name, seconds in once.items()}
    parts["ZeRO"] += communication.collective_seconds(setup, hardware, communication.step_bytes(setup))
    parts["offload"] += offload.step_seconds(setup, hardware)
    parts["optimizer"] = traffic.update(setup) / (hardware.hbm_gbs * GB_S)
    parts[WAITING] = parts.get(WAITING, 0.0) + HOST_SECONDS["step"]
    return StepTime({name: seconds for name, seconds in parts.items() if seconds})


def _compute(setup: Setup, hardware: Hardware) -> dict[str, float]:
    """Of one micro-batch."""
    parts = {
        "matmul": matmul_flops(setup) / (hardware.matmul_tflops * TFLOPS),
        "attention": _attention(setup, hardware),
        "norms, rotary, SwiGLU": traffic.layers(setup) / (hardware.hbm_gbs * GB_S),
        "loss": loss_flops(setup) / (hardware.matmul_tflops * TFLOPS) + traffic.loss(setup) / (hardware.hbm_gbs * GB_S),
    }
    waiting = _host(setup) - sum(parts.values())
    return parts if waiting < 0 else parts | {WAITING: waiting}


def matmul_flops(setup: Setup) -> float:
    """Operations of the layers' linear maps in one micro-batch.

    Recomputation stops before the last product, the MLP's down projection; a tiled MLP leaves it all out, and computes
    gate and up again by itself, with and without checkpointing.
    """
    shape = setup.shape
    attention = 2.0 * setup.tokens * shape.hidden_size * 2 * (setup.query_size + shape.kv_heads * shape.head_dim)
    mlp = 2.0 * setup.tokens * 3 * shape.hidden_size * shape.mlp_size
    again = setup.train.activation_checkpointing
    gate_and_up = 2 / 3 if again or setup.train.mlp_tile_tokens else 0
    return shape.layers * ((3 + again) * attention + (3 + gate_and_up) * mlp)


def loss_flops(setup: Setup) -> float:
    """Operations of the output layer."""
    return 3 * 2.0 * setup.tokens * setup.shape.vocab_size * setup.shape.hidden_size


def _passes(setup: Setup) -> int:
    """Through attention, forward, again and backward."""
    return 2 + _again(setup)


def _again(setup: Setup) -> int:
    return int(setup.train.activation_checkpointing and not setup.train.keep_attention)


def _attention(setup: Setup, hardware: Hardware) -> float:
    """Seconds of all layers. Where the gate's choices are kept, it is computed once."""
    return sum(
        layers * (_full(setup, hardware) if spec.kind == "full" else _moba(setup, hardware, spec))
        for spec, layers in Counter(setup.specs).items()
    )


def _full(setup: Setup, hardware: Hardware) -> float:
    flops = _pair_flops(setup) * full_keys([setup.stage.context_length]) * setup.rows
    forward, backward = hardware.full_forward_tflops, hardware.full_backward_tflops
    return _attention_seconds(setup, "full", flops, forward, backward)


def _moba(setup: Setup, hardware: Hardware, spec: AttentionSpec) -> float:
    block_size, top_k = spec.moba
    length = [setup.stage.context_length]
    flops = _pair_flops(setup) * moba_keys(length, block_size, top_k) * setup.rows
    forward, backward = (hardware.moba_tflops(block_size, backward) for backward in (False, True))
    # Choosing costs more than scoring, so heads of 64 numbers take as long as those of 128, where it was measured.
    pairs = setup.shape.heads / setup.sequence_parallel_size * gate_scores(length, block_size) * setup.rows
    gate = 2 * max(128, setup.shape.head_dim) * pairs * (top_k > 1)
    # A query and its partial output, or its gradient, for each chosen block, read and written.
    entries = HALF * setup.query_size * setup.tokens * chosen(setup, spec)
    forwards = 1 + _again(setup)
    return (
        _attention_seconds(setup, "moba", flops, forward, backward)
        + (1 if setup.train.keep_choices else 2) * gate / hardware.gate_tflops / TFLOPS
        + entries * 3 * (forwards + 1) / (hardware.hbm_gbs * GB_S)
    )


def _pair_flops(setup: Setup) -> float:
    """Two products over a pair of query and key, of the heads that a rank has."""
    return 4.0 * setup.query_size / setup.sequence_parallel_size


def _attention_seconds(setup: Setup, kind: str, flops: float, forward: float, backward: float) -> float:
    """Of the operations of one forward pass, and two and a half times as many backward, at TFLOP/s of head_dim 128."""
    slower = HEAD_DIM_64[kind] if setup.shape.head_dim < 128 else (1.0, 1.0)
    return flops * ((1 + _again(setup)) * slower[0] / forward + 2.5 * slower[1] / backward) / TFLOPS


def _host(setup: Setup) -> float:
    layer = (1 + setup.train.activation_checkpointing) * HOST_SECONDS["forward"] + HOST_SECONDS["backward"]
    tiles = -(-setup.tokens // setup.train.loss_tile_tokens)
    return setup.shape.layers * layer + tiles * HOST_SECONDS["tile"]
