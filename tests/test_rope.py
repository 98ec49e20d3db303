from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moba_train.config import RopeConfig
from moba_train.rope import rope_parameters, set_rope
from tiny import TINY_LLAMA


def build(**changes: object):
    keywords = {**TINY_LLAMA, **changes}
    keywords.pop("model_type")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **keywords)).eval()


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(rope_theta=500000.0),
        RopeConfig(rope_type="linear", factor=4.0),
        RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
        RopeConfig(
            rope_type="llama3",
            factor=8.0,
            original_max_position_embeddings=64,
            extra={"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        ),
    ],
    ids=lambda rope: rope.rope_type or "theta",
)
def test_a_live_model_equals_one_built_so(rope: RopeConfig) -> None:
    model = build()
    parameters = rope_parameters(model.config.rope_parameters, rope)
    built = build(rope_parameters=parameters, max_position_embeddings=256)
    ids = torch.randint(300, (1, 200))
    before = model(ids).logits
    set_rope(model, parameters, 256)
    assert model.config.max_position_embeddings == 256
    assert not torch.equal(model(ids).logits, before)
    torch.testing.assert_close(model(ids).logits, built(ids).logits, rtol=0, atol=0)


def test_frequencies_stay_fp32_in_a_bf16_model() -> None:
    model = build().to(torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype is torch.bfloat16  # the trap
    set_rope(model, model.config.rope_parameters, 64)
    assert model.model.rotary_emb.inv_freq.dtype is torch.float32


def test_unset_fields_keep_the_models_values() -> None:
    present = {"rope_type": "default", "rope_theta": 123.0}
    assert rope_parameters(present, RopeConfig()) == present
    linear = rope_parameters(present, RopeConfig(rope_type="linear", factor=1.0))
    assert linear == {"rope_type": "linear", "rope_theta": 123.0, "factor": 1.0}
    assert rope_parameters(linear, RopeConfig(rope_type="default")) == present


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (RopeConfig(rope_type="linear"), "rope_type=linear needs rope.factor"),
        (RopeConfig(rope_type="yarm"), "rope_type=yarm is unknown: choose from .*yarn"),
        (RopeConfig(rope_theta=0.0), r"rope_theta=0\.0: must be above 0"),
        (RopeConfig(rope_theta=float("nan")), "rope_theta=nan: must be above 0"),
        (RopeConfig(rope_type="linear", factor=0.1), "factor=0.1: must be at least 1"),
        (RopeConfig(rope_type="linear", factor=float("nan")), "factor=nan: must be at least 1"),
        (RopeConfig(rope_type="yarn", factor=2.0), "needs rope.original_max_position_embeddings"),
    ],
)
def test_what_is_missing_is_named(rope: RopeConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope_parameters({"rope_type": "default", "rope_theta": 1e4}, rope)


def test_a_model_that_keeps_its_frequencies_elsewhere_is_told() -> None:
    model = build()
    del model.model.rotary_emb
    with pytest.raises(ValueError, match="LlamaForCausalLM keeps no rotary_emb module"):
        set_rope(model, model.config.rope_parameters, 64)
    model.model.rotary_emb = torch.nn.Identity()
    with pytest.raises(ValueError, match="LlamaForCausalLM keeps no rotary_emb module"):
        set_rope(model, model.config.rope_parameters, 64)
