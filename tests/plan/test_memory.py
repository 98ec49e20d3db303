"""Predicted memory against the real model, run on fake tensors at full size and counted."""

from __future__ import annotations

import pytest

from moba_train.config import AttentionKind, Precision
from moba_train.plan import activations, states
from moba_train.plan.memory import predict_memory
from moba_train.plan.setup import Setup
from plan.cases import LLAMA_1B, LLAMA_8B, recipe, setup_of
from plan.fake_pass import pass_through
from plan.live_bytes import LiveBytes


def counted_peak(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of a forward and backward pass through the training code, the parameters' bf16 gradients included."""
    live = LiveBytes()
    pass_through(setup, monkeypatch, live)
    return live.peak


FIRST, LAST, NORM = (f"backward pass of the {name}" for name in ("first layer", "last layer", "last norm"))
SMALL = LLAMA_1B | {"vocab_size": 4096}


@pytest.mark.parametrize(
    ("architecture", "context", "moment", "train"),
    [
        (LLAMA_1B, 4096, "loss", {}),
        (LLAMA_1B, 131072, LAST, {}),
        (LLAMA_1B, 4096, "loss", {"activation_checkpointing": False}),
        (LLAMA_8B, 131072, LAST, {"loss_tile_tokens": 512}),
        (SMALL, 65536, NORM, {"activation_checkpointing": False}),
        (SMALL | {"intermediate_size": 256}, 131072, LAST, {}),  # its norm
        (SMALL, 131072, LAST, {"mlp_tile_tokens": 8192}),  # its norm again
        (SMALL | {"num_hidden_layers": 8}, 2048, FIRST, {"loss_tile_tokens": 512}),
        (SMALL | {"num_hidden_layers": 8}, 8192, FIRST, {"mlp_tile_tokens": 4096}),
    ],
    ids=[
        "loss",
        "layer",
        "loss, all kept",
        "8B",
        "last norm",
        "norm",
        "MLP in tiles",
        "gradients",
        "tile",
    ],
)
def test_peak_equals_what_the_code_allocates(architecture, context, moment, train, monkeypatch) -> None:
    setup = setup_of(recipe(architecture, context, gradient_dtype=Precision.bf16, **train))
    apart = {*states.resting(setup), *states.bucket(setup), "cuBLAS"}
    moments = {
        name: sum(size for part, size in parts.items() if part not in apart)
        for name, parts in predict_memory(setup).moments.items()
        if name in ("loss", FIRST, LAST, NORM)
    }
    assert max(moments, key=moments.__getitem__) == moment
    assert moments[moment] == pytest.approx(counted_peak(setup, monkeypatch), rel=0.003)


@pytest.mark.parametrize(("top_k", "context"), [(2, 4096), (12, 65536), (8, 131072)])
def test_workspace_is_what_the_kernels_plan(top_k: int, context: int) -> None:
    from moba_train.attention.kernels import plan

    config = recipe(LLAMA_1B, context)
    config.attention.top_k, config.attention.block_size = top_k, 256
    setup = setup_of(config)
    sizes = plan.Sizes(context, 8, 4, top_k - 1, 64, 256)
    heads, tokens = plan.chunk_size(sizes, 2)
    entries = heads * tokens * 4 * (top_k - 1)
    planned = entries * (2 * 64 + plan.ENTRY_BYTES) + 4 * 8 * context * 4 * (top_k - 1)
    assert activations.workspace(setup, setup.specs[0]) * context == pytest.approx(planned, rel=0.003)


@pytest.mark.parametrize(("blocks", "width"), [(256, 1), (257, 2), (32768, 2), (32769, 4)])
def test_choices_are_as_wide_as_the_kernels_make_them(blocks: int, width: int) -> None:
    from moba_train.attention.kernels.select import choice_type

    config = recipe(LLAMA_1B, 16 * blocks)
    config.attention.top_k, config.attention.block_size = 4, 16
    setup = setup_of(config)
    assert choice_type(16 * blocks, 16).itemsize == width
    assert activations.choices(setup, setup.specs[0]) == width * 32 * 3


def test_kept_outputs_by_hand() -> None:
    """They are kept inside the operators, which fake tensors do not enter: a layer's leave its working set."""
    without, with_them = (
        predict_memory(setup_of(recipe(LLAMA_1B, 131072, keep_attention=keep))).moments[LAST] for keep in (False, True)
    )
    outputs = 131072 * (2 * 32 * 64 + 4 * 32)
    assert with_them["attention outputs"] == 3 * outputs
    assert sum(with_them.values()) - sum(without.values()) == 2 * outputs


def test_choices_that_are_not_kept_are_those_of_one_layer() -> None:
    kept, made_again = (
        predict_memory(setup_of(recipe(LLAMA_1B, 131072, keep_choices=keep))).moments[LAST]["choices"]
        for keep in (True, False)
    )
    assert kept == 3 * made_again > 0


def test_more_of_anything_takes_more() -> None:
    def needed(context: int = 65536, **train) -> float:
        return predict_memory(setup_of(recipe(LLAMA_1B, context, **train))).needed

    assert needed(131072) > needed() < needed(activation_checkpointing=False)
    assert needed(context=4096, loss_tile_tokens=4096) > needed(context=4096, loss_tile_tokens=512)


def test_a_full_layer_keeps_no_choices() -> None:
    config = recipe(LLAMA_1B, 32768)
    assert "choices" in predict_memory(setup_of(config)).parts
    config.attention.kind = AttentionKind.full
    assert "choices" not in predict_memory(setup_of(config)).parts
