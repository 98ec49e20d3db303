"""Predicted memory against the real model, run on fake tensors at full size and counted."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from moba_train import hf_attention
from moba_train.attention import backends
from moba_train.attention.blocks import Blocks
from moba_train.config import AttentionKind, ModelConfig
from moba_train.loss import TokenLosses
from moba_train.model import described_configuration, planned_shape
from moba_train.plan import activations, states
from moba_train.plan.memory import predict_memory
from moba_train.plan.setup import Setup
from moba_train.recompute import checkpoint_activations
from plan.cases import LLAMA_1B, LLAMA_8B, recipe, setup_of
from plan.live_bytes import LiveBytes

op = pytest.importorskip("moba_train.attention.kernels.op", reason="triton is not installed")


def counted_peak(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of a forward and backward pass through the training code; parameters and their gradients apart."""

    def cut(bounds: torch.Tensor, block_size: int, tokens: int) -> Blocks:  # the real one reads its bounds
        blocks = tokens // block_size + 1
        return Blocks(*(torch.empty(size, dtype=torch.int32) for size in (blocks + 1, blocks, tokens)))

    monkeypatch.setattr(op, "cut", cut)
    monkeypatch.setitem(
        backends.BACKENDS, "triton", backends.Backend(backends._triton, lambda query, key, spec: None, ("moba",))
    )
    hf_attention.register()
    length, train = setup.stage.context_length, setup.train
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(
            described_configuration(setup.config.model), dtype=torch.bfloat16, attn_implementation="moba"
        ).train()
        if train.activation_checkpointing:
            checkpoint_activations(model)
        hf_attention.set_plan(model, setup.specs, "triton")
        losses = TokenLosses(model, train.loss_tile_tokens)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
        bounds = torch.zeros(2, dtype=torch.int32)
        with LiveBytes() as live:
            names = ("input_ids", "targets", "position_ids")
            inputs = {name: torch.zeros(setup.rows, length, dtype=torch.int64) for name in names}
            losses(**inputs, cu_seq_lens_q=bounds, max_length_q=length).sum().backward()
    return live.peak


@pytest.mark.parametrize(
    ("architecture", "context", "moment", "train"),
    [
        (LLAMA_1B, 16384, "loss", {}),
        (LLAMA_1B, 131072, "backward pass of a layer", {}),
        (LLAMA_1B, 16384, "loss", {"activation_checkpointing": False}),
        (LLAMA_8B, 131072, "backward pass of a layer", {"loss_tile_tokens": 512}),
        (LLAMA_1B | {"vocab_size": 4096}, 65536, "backward pass of the last norm", {"activation_checkpointing": False}),
        (LLAMA_1B | {"vocab_size": 4096, "intermediate_size": 256}, 131072, "backward pass of a layer", {}),  # its norm
    ],
    ids=["loss", "layer", "nothing recomputed", "8B", "last norm", "norm"],
)
def test_peak_equals_what_the_code_allocates(architecture, context, moment, train, monkeypatch) -> None:
    setup = setup_of(recipe(architecture, context, **train))
    memory = predict_memory(setup)
    predicted = memory.moments[moment]
    assert sum(predicted.values()) == max(
        sum(parts.values()) for name, parts in memory.moments.items() if name != "optimizer step"
    )
    resting = sum(states.states(setup).values())
    assert sum(predicted.values()) - resting == pytest.approx(counted_peak(setup, monkeypatch), rel=0.003)


@pytest.mark.parametrize(("top_k", "context"), [(2, 4096), (12, 65536), (8, 131072)])
def test_workspace_is_what_the_kernels_plan(top_k: int, context: int) -> None:
    from moba_train.attention.kernels import plan

    config = recipe(LLAMA_1B, context)
    config.attention.top_k, config.attention.block_size = top_k, 256
    setup = setup_of(config)
    sizes = plan.Sizes(context, 8, 4, top_k - 1, 64, 256)
    heads, tokens = plan.chunk_size(sizes, 2)
    entries = heads * tokens * 4 * (top_k - 1)
    planned = entries * (2 * 64 + plan.ENTRY_BYTES)
    assert activations.workspace(setup, setup.specs[0]) * context == pytest.approx(planned, rel=0.01)


def test_states_of_the_stages_by_hand() -> None:
    count = planned_shape(ModelConfig(architecture=LLAMA_1B)).parameters
    config = recipe(LLAMA_1B, 32768 * 8)
    config.launch.processes = 4

    def total(stage: int) -> float:
        config.train.zero_stage = stage
        return sum(states.states(setup_of(config)).values()) / count

    assert total(1) == pytest.approx(2 + 6 + 12 / 4)
    assert total(2) == pytest.approx(2 + 4 / 4 + 12 / 4)
    assert total(3) == pytest.approx((2 + 4 + 12) / 4)


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
