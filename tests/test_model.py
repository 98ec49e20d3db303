"""Loading and building the model: its configuration wins, nothing is added, and faults are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from moba_train import hf_attention
from moba_train.attention.spec import AttentionSpec
from moba_train.config import ModelConfig, Precision
from moba_train.loss import IGNORE, TokenLosses
from moba_train.model import load_model, model_configuration, planned_shape, tokenizer_path
from moba_train.recompute import checkpoint_activations
from tiny import TINY_LLAMA


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dense model as plain transformers saves it, with a RoPE of its own."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(5)
    shape = {key: value for key, value in TINY_LLAMA.items() if key != "model_type"}
    config = LlamaConfig(**{**shape, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}})
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def test_a_loaded_model_is_the_saved_one(folder: Path, tmp_path: Path) -> None:
    model = load_model(ModelConfig(path=str(folder)), Precision.fp32)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.rope_parameters["rope_theta"] == 5000.0
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    saved, before = (json.loads((path / "config.json").read_text()) for path in (tmp_path, folder))
    assert saved == before


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("source", ["loaded", "new"])
def test_precision_and_mode(folder: Path, source: str, precision: Precision) -> None:
    """Training mode from the first step on: an evaluation mode would leave out dropout and activation checkpointing."""
    config = ModelConfig(path=str(folder)) if source == "loaded" else ModelConfig(architecture=dict(TINY_LLAMA))
    model = load_model(config, precision)
    dtype = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}[precision]
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.base_model.rotary_emb.inv_freq.dtype is torch.float32
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == hf_attention.NAME


def test_new_weights_follow_the_seed() -> None:
    def embedding(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return load_model(ModelConfig(architecture=dict(TINY_LLAMA)), Precision.fp32).get_input_embeddings().weight

    assert torch.equal(embedding(1), embedding(1)) and not torch.equal(embedding(1), embedding(2))


def losses_and_gradients(folder: Path, recompute: bool) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Of one pass over two documents with MoBA below and full attention on top, and how often a layer ran."""
    model = load_model(ModelConfig(path=str(folder)), Precision.fp32)
    moba = AttentionSpec("moba", block_size=8, top_k=2)
    hf_attention.set_plan(model, [moba, moba, AttentionSpec("full")], "varlen")
    if recompute:
        checkpoint_activations(model)
    passes: list[int] = []
    model.base_model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    ids = torch.randint(300, (1, 64), generator=torch.Generator().manual_seed(2))
    bounds = torch.tensor([0, 40, 64], dtype=torch.int32)
    targets = ids.roll(-1, 1)
    targets[:, [39, 63]] = IGNORE
    positions = torch.cat([torch.arange(40), torch.arange(24)])[None]
    loss, losses = TokenLosses(model, tile_tokens=20)(
        ids, targets, position_ids=positions, cu_seq_lens_q=bounds, max_length_q=64
    )
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    return losses, gradients, len(passes)


def test_activation_checkpointing_changes_no_number(folder: Path) -> None:
    losses, gradients, passes = losses_and_gradients(folder, recompute=False)
    again, recomputed, passes_again = losses_and_gradients(folder, recompute=True)
    assert (passes, passes_again) == (1, 2)
    assert torch.equal(losses, again)
    for one, two in zip(gradients, recomputed, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-6)


def test_an_architecture_beside_a_path_agrees_with_it(folder: Path) -> None:
    described = ModelConfig(path=str(folder), architecture=dict(TINY_LLAMA))
    assert model_configuration(described).hidden_size == 32
    described.architecture["num_hidden_layers"] = 7
    with pytest.raises(ValueError, match=r"num_hidden_layers=7 and model\.path=.* has 3: take out the architecture"):
        model_configuration(described)


def test_planned_sizes_need_no_files() -> None:
    described = ModelConfig(path="nobody/no-such-model", architecture=dict(TINY_LLAMA))
    assert planned_shape(described) == planned_shape(ModelConfig(architecture=dict(TINY_LLAMA)))
    assert planned_shape(described).layers == 3


def test_no_folder_is_one_line(tmp_path: Path) -> None:
    def refused(words: str, **settings) -> None:
        with pytest.raises(ValueError, match=words) as caught:
            model_configuration(ModelConfig(**settings))
        assert "\n" not in str(caught.value)

    refused("give a path to load, or an architecture")
    refused(r"model\.path=/nope is not a folder", path="/nope")
    refused(r"model\.path=nope is not a folder", path="nope")
    refused("holds no config.json", path=str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    for content in ("{", "{}", '{"model_type": "llama", "hidden_size": "wide"}', '{"model_type": "nope"}', "[]"):
        (tmp_path / "config.json").write_text(content)
        refused(r"model\.path=.* cannot be loaded", path=str(tmp_path))
    refused("no model_type", architecture={"hidden_size": 8})
    refused("model_type=lama is unknown to transformers: try llama", architecture={"model_type": "lama"})
    refused("did you mean num_hidden_layers", architecture={"model_type": "llama", "num_hiden_layers": 2})
    refused("hidden_size", architecture={"model_type": "llama", "hidden_size": "wide"})


def test_weights_that_are_missing_or_damaged(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"model\.path=.* no weights"):
        model_configuration(ModelConfig(path=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.path=.* cannot be loaded") as caught:
        load_model(ModelConfig(path=str(tmp_path)), Precision.fp32)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_those_of_the_configuration(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).model.save_pretrained(tmp_path)  # without its output layer
    with pytest.raises(ValueError, match=r"lacks weights .* \(1 of them, lm_head\.weight first\)"):
        load_model(ModelConfig(path=str(tmp_path)), Precision.fp32)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    described = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**described, "intermediate_size": 64}))
    with pytest.raises(
        ValueError, match=r"mlp\.down_proj\.weight has shape \(32, 48\), and by config\.json \(32, 64\)"
    ):
        load_model(ModelConfig(path=str(tmp_path)), Precision.fp32)


def test_tokenizer_path(folder: Path) -> None:
    assert tokenizer_path(ModelConfig(path=str(folder))) == str(folder)
    assert tokenizer_path(ModelConfig(path=str(folder), tokenizer="other")) == "other"
    with pytest.raises(ValueError, match=r"model\.tokenizer is not set"):
        tokenizer_path(ModelConfig(architecture=dict(TINY_LLAMA)))
