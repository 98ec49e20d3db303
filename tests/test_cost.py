"""Counts against brute force and against real models; costs against torch's own FLOP counter."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from moba_train.cost import (
    DecoderShape,
    StepCost,
    device_peak_flops,
    full_keys,
    gate_scores,
    moba_keys,
    sparsity,
    step_cost,
)


@dataclass
class Spec:
    kind: str = "full"
    block_size: int | None = None
    top_k: int | None = None


SIZES = dict(  # no size is another's, nor 2: its double would be its sum with 2
    vocab_size=128,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=3,
    pad_token_id=0,
)


def config_of(model_type: str, **settings):
    return AutoConfig.for_model(model_type, **{**SIZES, **settings})


def brute_force(lengths, block_size, top_k):
    keys = scores = 0
    for length in lengths:
        for position in range(length):
            block = position // block_size
            keys += position - block * block_size + 1 + min(top_k - 1, block) * block_size
            scores += block
    return keys, scores


@given(st.lists(st.integers(0, 70), max_size=4), st.integers(1, 20), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_keys_and_gate_scores_by_brute_force(lengths, block_size, top_k):
    keys, scores = brute_force(lengths, block_size, top_k)
    assert moba_keys(lengths, block_size, top_k) == keys
    assert gate_scores(lengths, block_size) == scores
    assert full_keys(lengths) == sum(position + 1 for length in lengths for position in range(length))


def test_limits_of_moba():
    assert moba_keys([100], 16, 1) == 6 * 136 + 10  # the own block alone
    assert moba_keys([100, 37], 16, 7) == full_keys([100, 37])  # top_k covers everything
    assert full_keys([10**7]) == 10**7 * (10**7 + 1) // 2


@pytest.mark.parametrize(
    ("block_size", "top_k", "length", "expected"),
    [(512, 3, 32768, 0.953125), (4096, 12, 1 << 20, 0.953125), (2048, 3, 8192, 0.25), (512, 3, 1024, 0.0)],
)
def test_sparsity_as_the_paper_gives_it(block_size, top_k, length, expected):
    assert sparsity(block_size, top_k, length) == expected


@pytest.mark.parametrize(
    "config",
    [
        config_of("llama"),
        config_of("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        config_of("mistral", head_dim=16),
        config_of("qwen2"),
        config_of("qwen3", head_dim=16, attention_bias=True),
    ],
    ids=["llama", "llama-biases-tied", "mistral", "qwen2", "qwen3"],
)
def test_parameters_equal_the_models(config):
    model = AutoModelForCausalLM.from_config(config)
    assert DecoderShape.from_config(config).parameters == sum(p.numel() for p in model.parameters())


def test_forward_and_backward_equal_torchs_counter():
    """Linear layers exactly; the counter's dense attention reads all n² keys, ours the causal half."""
    config = config_of("llama", attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config)
    length = 24
    ids = torch.randint(0, 128, (2, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    shape = DecoderShape.from_config(config)
    cost = step_cost(shape, [Spec()] * 3, [length, length])
    pair_flops = 3 * 3 * 4 * shape.heads * shape.head_dim  # layers, forward and backward, two products
    dense = cost.model_flops + pair_flops * (2 * length**2 - full_keys([length, length]))
    counted = counter.get_total_flops()
    assert dense == pytest.approx(counted, rel=1e-3)


def test_moba_and_recomputation_by_hand():
    shape = replace(DecoderShape.from_config(config_of("llama")), layers=1)
    plan, lengths = [Spec("moba", 4, 2)], [10, 3, 0]
    linear, head = 2 * 13 * shape.layer_matrix_parameters, 2 * 13 * 128 * 48
    pairs = 2 * shape.heads * shape.head_dim
    attention, gate = 2 * pairs * moba_keys(lengths, 4, 2), pairs * gate_scores(lengths, 4)
    plain = step_cost(shape, plan, lengths)
    assert plain.model_flops == 3 * (linear + attention + head) + gate
    assert plain.hardware_flops == 3 * (linear + head) + 3.5 * attention + gate
    again = step_cost(shape, plan, lengths, activation_checkpointing=True)
    assert again.model_flops == plain.model_flops
    assert again.hardware_flops == plain.hardware_flops + linear + attention
    kept = step_cost(shape, plan, lengths, activation_checkpointing=True, keep_attention=True)
    assert kept.hardware_flops == plain.hardware_flops + linear
    less = step_cost(shape, plan, lengths, activation_checkpointing=True, keep_choices=False)
    assert less.hardware_flops == plain.hardware_flops + linear + attention + gate


def test_no_gate_where_nothing_is_chosen():
    shape = replace(DecoderShape.from_config(config_of("llama")), layers=1)
    one, own = (step_cost(shape, [Spec("moba", 4, k)], [40]).model_flops for k in (2, 1))
    pairs = 2 * shape.heads * shape.head_dim
    assert one - own == 3 * 2 * pairs * (moba_keys([40], 4, 2) - moba_keys([40], 4, 1)) + pairs * gate_scores([40], 4)


def test_costs_add_up():
    shape = DecoderShape.from_config(config_of("llama"))
    plan = [Spec("moba", 8, 2), Spec("moba", 8, 2), Spec()]
    parts = step_cost(shape, plan, [30]) + step_cost(shape, plan, [7, 9])
    assert parts == step_cost(shape, plan, [30, 7, 9])
    assert parts + StepCost(1.0, 2.0) == StepCost(parts.model_flops + 1, parts.hardware_flops + 2)


def test_layers_of_several_kinds_cost_what_each_does():
    shape = DecoderShape.from_config(config_of("llama"))
    kinds = [Spec("moba", 8, 2), Spec("moba", 4, 3), Spec()]
    each = [step_cost(shape, [spec] * 3, [30, 21], activation_checkpointing=True) for spec in kinds]
    mixed = step_cost(shape, kinds, [30, 21], activation_checkpointing=True)
    assert mixed.model_flops == pytest.approx(sum(cost.model_flops for cost in each) / 3)
    assert mixed.hardware_flops == pytest.approx(sum(cost.hardware_flops for cost in each) / 3)


def test_refusals():
    shape = DecoderShape.from_config(config_of("llama"))
    with pytest.raises(ValueError, match="plan of 2 layers for a model of 3"):
        step_cost(shape, [Spec()] * 2, [8])
    with pytest.raises(ValueError, match="model_type=gpt2 has no intermediate_size"):
        DecoderShape.from_config(AutoConfig.for_model("gpt2"))
    with pytest.raises(ValueError, match="model_type=mixtral: the cost of experts"):
        DecoderShape.from_config(AutoConfig.for_model("mixtral"))


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
    ],
)
def test_device_peaks(name, tflops):
    assert device_peak_flops(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA A10G", "Tesla T4", "NVIDIA RTX A4000"])
def test_unknown_devices(name):
    assert device_peak_flops(name) is None


def test_needs_no_torch():
    code = "import sys, moba_train.cost; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
