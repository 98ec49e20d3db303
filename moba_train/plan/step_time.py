"""Seconds of an optimizer step, from operations and bytes over the rates that kernels reach."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from moba_train.attention.spec import AttentionSpec
from moba_train.cost import full_keys, gate_scores, moba_keys
from moba_train.plan import communication
from moba_train.plan.activations import HALF, chosen
from moba_train.plan.hardware import GB_S, Hardware
from moba_train.plan.setup import Setup

TFLOPS = 1e12

# What the host needs to start the operators of a layer or of a tile of the loss, in eager mode: small models wait.
HOST_SECONDS = {"forward": 0.6e-3, "backward": 1.2e-3, "tile": 0.4e-3}


@dataclass(frozen=True)
class StepTime:
    """Seconds by part; the parts follow each other, what overlaps is taken out before."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def predict_time(setup: Setup, hardware: Hardware) -> StepTime:
    """Of a step of the stage."""
    again = 1 if setup.train.activation_checkpointing else 0
    once = {
        "matmul": _matmul(setup, again) / (hardware.matmul_tflops * TFLOPS),
        "attention": _attention(setup, hardware, again),
        "norms, rotary, SwiGLU": _elementwise(setup, again) / (hardware.hbm_gbs * GB_S),
        "loss": _loss(setup, hardware),
    }
    compute = sum(once.values())
    if (host := _host(setup, again)) > compute:
        once["waiting for the host"] = host - compute
    moved = communication.collective_seconds(setup, hardware, communication.pass_bytes(setup))
    if setup.train.zero_stage == 3:  # gathers and reductions run beside the arithmetic
        moved = max(0.0, moved - compute)
    exchanges = (2 + again) * setup.shape.layers
    once["Ulysses"] = exchanges * communication.exchange_seconds(setup, hardware, communication.ulysses_bytes(setup))
    once["ZeRO"] = moved
    parts = {name: seconds * setup.micro_batches for name, seconds in once.items()}
    parts["ZeRO"] += communication.collective_seconds(setup, hardware, communication.step_bytes(setup))
    parts["optimizer"] = _update(setup, hardware)
    return StepTime({name: seconds for name, seconds in parts.items() if seconds})


def _matmul(setup: Setup, again: int) -> float:
    """Operations of the layers' linear maps: forward, as often again, and twice that backward."""
    return (3 + again) * 2.0 * setup.tokens * setup.shape.layer_matrix_parameters * setup.shape.layers


def _attention(setup: Setup, hardware: Hardware, again: int) -> float:
    """Seconds of all layers. The gate's choices are kept, so it is computed once."""
    return sum(
        layers * (_full(setup, hardware, again) if spec.kind == "full" else _moba(setup, hardware, spec, again))
        for spec, layers in Counter(setup.specs).items()
    )


def _full(setup: Setup, hardware: Hardware, again: int) -> float:
    flops = _pair_flops(setup) * full_keys([setup.stage.context_length]) * setup.rows
    forward, backward = hardware.full_forward_tflops, hardware.full_backward_tflops
    return _slower(setup) * flops * ((1 + again) / forward + 2.5 / backward) / TFLOPS


def _moba(setup: Setup, hardware: Hardware, spec: AttentionSpec, again: int) -> float:
    block_size, top_k = spec.moba
    length = [setup.stage.context_length]
    flops = _pair_flops(setup) * moba_keys(length, block_size, top_k) * setup.rows
    forward, backward = (hardware.moba_tflops(block_size, backward) for backward in (False, True))
    gate = _pair_flops(setup) / 2 * gate_scores(length, block_size) * setup.rows if top_k > 1 else 0
    # A query and its partial output for each chosen block, read and written; backward the output's gradient too.
    entries = HALF * setup.query_size * setup.tokens * chosen(setup, spec)
    return (
        _slower(setup) * flops * ((1 + again) / forward + 2.5 / backward) / TFLOPS
        + gate / hardware.gate_tflops / TFLOPS
        + entries * (3 * (1 + again) + 5) / (hardware.hbm_gbs * GB_S)
    )


def _pair_flops(setup: Setup) -> float:
    """Two products over a pair of query and key, of the heads that a rank has."""
    return 4.0 * setup.query_size / setup.sequence_parallel_size


def _slower(setup: Setup) -> float:
    """Softmax weighs twice as much beside products half as long."""
    return 1.0 if setup.shape.head_dim >= 128 else 1.25


def _elementwise(setup: Setup, again: int) -> float:
    """Bytes that a layer's operators read and write, products and attention apart: counted on transformers' layer."""
    h, m, heads = setup.shape.hidden_size, setup.shape.mlp_size, setup.query_size + setup.key_size
    forward, backward = 84 * h + 10 * m + 20 * heads, 214 * h + 18 * m + 32 * heads
    return setup.tokens * setup.shape.layers * ((1 + again) * forward + backward)


def _loss(setup: Setup, hardware: Hardware) -> float:
    """The output layer (once more in the backward pass) and the passes over its logits."""
    shape = setup.shape
    products = 4 * 2.0 * setup.tokens * shape.vocab_size * shape.hidden_size
    moved = 50.0 * setup.tokens * shape.vocab_size
    return products / (hardware.matmul_tflops * TFLOPS) + moved / (hardware.hbm_gbs * GB_S)


def _host(setup: Setup, again: int) -> float:
    layer = (1 + again) * HOST_SECONDS["forward"] + HOST_SECONDS["backward"]
    tiles = -(-setup.tokens // setup.train.loss_tile_tokens)
    return setup.shape.layers * layer + tiles * HOST_SECONDS["tile"]


def _update(setup: Setup, hardware: Hardware) -> float:
    """AdamW, norm, clipping and copies: 48 bytes a parameter, sharded; 16 more where each rank adds up gradients."""
    count = setup.shape.parameters
    return (48.0 * count / setup.world_size + 16.0 * count) / (hardware.hbm_gbs * GB_S)
