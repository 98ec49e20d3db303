"""Predicted time: by hand where it can be done, and what must grow with what."""

from __future__ import annotations

import pytest

from moba_train.config import AttentionKind, Config
from moba_train.cost import full_keys
from moba_train.model import planned_shape
from moba_train.plan import communication
from moba_train.plan.hardware import H200
from moba_train.plan.setup import Setup
from moba_train.plan.step_time import loss_flops, matmul_flops, predict_time
from moba_train.schedule import build_schedule
from plan.cases import LLAMA_1B, LLAMA_8B, recipe, setup_of
from plan.fake_pass import Products, pass_through


def test_full_attention_by_hand() -> None:
    config = recipe(LLAMA_8B, 65536)
    config.attention.kind = AttentionKind.full
    pairs = 4 * 32 * 128 * full_keys([65536]) * 3
    expected = pairs * (2 / H200.full_forward_tflops + 2.5 / H200.full_backward_tflops) / 1e12
    assert predict_time(setup_of(config), H200).parts["attention"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "train",
    [{}, {"activation_checkpointing": False}, {"mlp_tile_tokens": 2048}, {"keep_attention": True}],
    ids=["recomputed", "all kept", "MLP in tiles", "attention kept"],
)
def test_products_are_those_of_the_training_code(train, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of(recipe(LLAMA_8B, 8192, **train))
    products = Products()
    pass_through(setup, monkeypatch, products)
    assert matmul_flops(setup) + loss_flops(setup) == products.flops


def seconds(config: Config) -> float:
    return predict_time(setup_of(config), H200).total


def test_moba_is_faster_where_it_reads_less() -> None:
    config = recipe(LLAMA_1B, 131072)
    config.attention.block_size, config.attention.top_k = 4096, 12
    sparse = seconds(config)
    config.attention.kind = AttentionKind.full
    assert seconds(config) > 1.1 * sparse


def test_a_small_model_waits_for_the_host() -> None:
    small = LLAMA_1B | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1}
    parts = predict_time(setup_of(recipe(small | {"vocab_size": 512}, 1024)), H200).parts
    assert parts["waiting for the host"] > sum(parts.values()) / 2


def across(nodes: int, **train) -> Setup:
    config = recipe(LLAMA_8B, 65536, tokens_per_step=65536 * 8 * nodes, **train)
    config.launch.nodes, config.launch.gpus_per_node = nodes, 8
    return Setup(config, planned_shape(config.model), build_schedule(config).stages[0])


def test_collectives_within_a_node_and_between_nodes() -> None:
    within, between = (communication.collective_seconds(across(nodes), H200, 8e9) for nodes in (1, 4))
    assert within == pytest.approx(8 * 7 / 8 / H200.nvlink_gbs)
    assert between == pytest.approx(max(8 * 31 / 32 / H200.nvlink_gbs, 8 * 3 / 4 / (8 * H200.network_gbs)))


def test_what_zero_moves() -> None:
    """Counted in bytes of all parameters in bf16."""
    moved = {}
    for stage in (1, 2, 3):
        setup = across(1, zero_stage=stage)
        size = 2 * setup.shape.parameters
        moved[stage] = (communication.pass_bytes(setup) / size, communication.step_bytes(setup) / size)
    assert moved == {1: (0, 3), 2: (1, 1), 3: (3, 0)}


def test_what_ulysses_exchanges() -> None:
    """Of a layer and 32,768 tokens on each of two ranks: half goes to the other, and all is copied once."""
    alone, shared = (across(1, sequence_parallel_size=size) for size in (1, 2))
    assert communication.exchange_seconds(alone, H200) == 0
    token = 2 * (2 * 32 + 2 * 8) * 128  # bytes of queries and output, keys and values
    size = 32768 * token
    expected = size / 2 / (208.8e9) + 2 * size / (H200.hbm_gbs * 1e9)
    assert communication.exchange_seconds(shared, H200) == pytest.approx(expected)
