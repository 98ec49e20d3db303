"""Key convolutions in whole models: nothing at step 0, segments, trained and resumed, and a folder of their own."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from moba_train import hf_attention, key_conv_folder
from moba_train.attention.key_conv import KeyConvolution
from moba_train.attention.spec import AttentionSpec
from moba_train.config import Config, ModelConfig, Precision
from moba_train.cost import DecoderShape
from moba_train.metrics_file import read_rows
from moba_train.model import load_model, planned_shape
from moba_train.optimizer import parameter_groups
from moba_train.recompute import checkpoint_activations
from tiny import TINY_LLAMA, checkpoint_tensors, run_forked

MOBA = AttentionSpec("moba", block_size=16, top_k=2)


def model_of(kind: str = "llama", width: int = 0, weights: bool = False):
    torch.manual_seed(0)
    architecture = {**TINY_LLAMA, "model_type": kind, **({"sliding_window": None} if kind == "mistral" else {})}
    if kind == "qwen2":
        del architecture["head_dim"]  # no setting of its
    model = load_model(ModelConfig(architecture=architecture), Precision.fp32, width)
    hf_attention.set_plan(model, [MOBA] * 3)
    if weights:
        for module in model.modules():
            if isinstance(module, KeyConvolution):
                torch.nn.init.normal_(module.weight)
    return model


def logits(model, ids: torch.Tensor, **keywords) -> torch.Tensor:
    return model(ids, use_cache=False, **keywords).logits


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_pretrained_model_is_unchanged_at_first_to_the_bit(kind: str) -> None:
    plain, convolved = model_of(kind), model_of(kind, 3)
    ids = torch.randint(300, (2, 70))
    assert torch.equal(logits(convolved, ids), logits(plain, ids))
    added = convolved.state_dict().keys() - plain.state_dict().keys()
    assert added == {f"model.layers.{i}.self_attn.key_conv.weight" for i in range(3)}
    assert all(convolved.state_dict()[name].shape == (16, 3) for name in added)
    trained = model_of(kind, 3, weights=True)
    assert not torch.allclose(logits(trained, ids), logits(plain, ids), atol=1e-3)


@pytest.mark.parametrize("given", ["bounds", "position_ids", "rows"])
def test_segments_do_not_see_each_other(given: str) -> None:
    model = model_of(width=5, weights=True)
    lengths = [30, 30, 30] if given == "rows" else [33, 1, 56]
    ids = torch.randint(300, (1, 90))
    keywords = {}
    if given == "bounds":
        keywords = {"cu_seq_lens_q": torch.tensor([0, 33, 34, 90, 90], dtype=torch.int32), "max_length_q": 90}
    if given != "rows":
        keywords["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
        packed = logits(model, ids, **keywords)
    else:
        packed = logits(model, ids.view(3, 30)).view(1, 90, -1)
    alone = [logits(model, part) for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)


def test_a_copy_of_a_model_has_convolutions_of_its_own() -> None:
    model = model_of(width=3)
    ids = torch.randint(300, (1, 70))
    before = logits(model, ids)
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, KeyConvolution):
            torch.nn.init.normal_(module.weight)
    assert torch.equal(logits(model, ids), before)
    assert not torch.allclose(logits(copied, ids), before, atol=1e-3)


class Added(torch.nn.Module):
    """A projection with another beside it, in whose place PEFT's LoRA puts it."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.beside = torch.nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base_layer(hidden) + self.beside(hidden)


def test_it_takes_the_whole_key_where_adapters_stand_around_the_projection() -> None:
    """So that merging them changes nothing; and a convolution in the place of ours is the one that acts."""
    model = model_of(width=3, weights=True)
    ids = torch.randint(300, (1, 70))
    plain = logits(model, ids)
    attentions = [layer.self_attn for layer in model.model.layers]
    for attention in attentions:
        attention.k_proj = Added(attention.k_proj)
    added = logits(model, ids)
    assert not torch.allclose(added, plain, atol=1e-3)
    for attention in attentions:
        attention.k_proj.base_layer.weight.data += attention.k_proj.beside.weight
        attention.k_proj = attention.k_proj.base_layer
    torch.testing.assert_close(logits(model, ids), added, rtol=1e-4, atol=1e-5)
    for attention in attentions:
        attention.key_conv = copy.deepcopy(attention.key_conv)
        torch.nn.init.normal_(attention.key_conv.weight)
    assert not torch.allclose(logits(model, ids), added, atol=1e-3)


def test_recomputation_changes_nothing() -> None:
    model = model_of(width=3, weights=True)
    ids = torch.randint(300, (2, 64))

    def gradients():
        return torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, list(model.parameters()))

    plain = gradients()
    checkpoint_activations(model)
    for got, want in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(got, want)


def test_convolutions_are_counted_and_not_decayed() -> None:
    model = model_of(width=5)
    count = sum(p.numel() for p in model.parameters())
    assert DecoderShape.from_config(model.config).parameters == count
    assert planned_shape(ModelConfig(architecture=dict(TINY_LLAMA)), 5).parameters == count
    kept = {id(parameter) for parameter in parameter_groups(model, 0.1)[1]["params"]}
    assert all(id(m.weight) in kept for m in model.modules() if isinstance(m, KeyConvolution))


def test_a_model_without_a_key_projection_is_refused() -> None:
    config = AutoConfig.for_model("phi3", **{k: v for k, v in TINY_LLAMA.items() if k != "model_type"}, pad_token_id=0)
    with pytest.raises(ValueError, match=r"attention.key_conv=3: phi3 has no k_proj.*key_conv=0"):
        hf_attention.add_key_convolutions(AutoModelForCausalLM.from_config(config), 3)


def test_the_folder_loads_here_and_nowhere_else(tmp_path: Path) -> None:
    model = model_of(width=3, weights=True)
    key_conv_folder.save(model, tmp_path)
    loaded = load_model(ModelConfig(path=str(tmp_path)), Precision.fp32)  # the folder's own width
    assert loaded.config.key_conv == 3 and loaded.config.model_type == "llama"
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    hf_attention.set_plan(loaded, [MOBA] * 3)
    ids = torch.randint(300, (1, 50))
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    with pytest.raises(ValueError, match=r"attention.key_conv=5 and the model has key convolutions of width 3"):
        load_model(ModelConfig(path=str(tmp_path)), Precision.fp32, 5)
    with pytest.raises(ValueError, match="moba_key_conv"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        LlamaForCausalLM.from_pretrained(tmp_path)

    convolutions = load_file(tmp_path / key_conv_folder.FILE)
    convolutions.popitem()
    save_file(convolutions, tmp_path / key_conv_folder.FILE)
    with pytest.raises(ValueError, match="does not hold the key convolutions"):
        load_model(ModelConfig(path=str(tmp_path)), Precision.fp32)
    (tmp_path / key_conv_folder.FILE).unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded \(.*key_conv\.safetensors"):
        load_model(ModelConfig(path=str(tmp_path)), Precision.fp32)


@pytest.fixture(scope="module")
def finished(tiny_config_module: Config, tmp_path_factory) -> Path:
    """The tiny run with convolutions, under activation checkpointing."""
    folder = tmp_path_factory.mktemp("key_conv") / "whole"
    done = run_forked(convolved(tiny_config_module), folder)
    assert done.returncode == 0, done.stderr
    assert "not with plain transformers" in done.stderr
    return folder


def convolved(config: Config, **train: object) -> Config:
    changed = copy.deepcopy(config)
    changed.attention.key_conv = 3
    changed.train.activation_checkpointing = True
    for name, value in train.items():
        setattr(changed.train, name, value)
    return changed


def losses(run: Path) -> list[float]:
    """Of every step, and held-out ones between them."""
    return [row.get("train/loss") or row["eval/loss"] for row in read_rows(run / "metrics.jsonl")]


def test_a_run_trains_them_resumes_to_the_same_bits_and_exports(
    finished: Path, tiny_config_module: Config, tmp_path: Path
) -> None:
    folder = tmp_path / "resumed"
    shutil.copytree(finished / "checkpoints/step_00000002", folder / "checkpoints/step_00000002")
    shutil.copy(finished / "metrics.jsonl", folder)
    done = run_forked(convolved(tiny_config_module), folder)
    assert done.returncode == 0, done.stderr
    expected, got = (checkpoint_tensors(run / "checkpoints/step_00000006") for run in (finished, folder))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert losses(folder) == losses(finished)

    exported = load_file(finished / "model" / key_conv_folder.FILE)
    assert len(exported) == 3 and all((tensor != 0).any() for tensor in exported.values())
    assert json.loads((finished / "model/config.json").read_text())["model_type"] == "moba_key_conv"
    for name, tensor in exported.items():
        (saved,) = (t for key, t in expected.items() if key.endswith(f"/module/model.{name}"))
        assert torch.equal(tensor, saved)


def test_a_run_goes_on_from_the_exported_folder(finished: Path, tiny_config_module: Config, tmp_path: Path) -> None:
    """Its held-out loss at the start is the one at the other run's end, where the last stage was full, as the start."""
    config = convolved(tiny_config_module)
    config.attention.key_conv = 0  # the folder knows
    config.model = ModelConfig(name="again", path=str(finished / "model"))
    config.schedule.stages = config.schedule.stages[1:]
    config.schedule.stages[0].tokens = 512
    done = run_forked(config, tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "again")[0] == pytest.approx(losses(finished)[-1], rel=1e-6)
    assert (tmp_path / "again/model" / key_conv_folder.FILE).is_file()


@pytest.mark.distributed
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_processes_learn_what_one_does(
    finished: Path, tiny_config_module: Config, tmp_path: Path, zero_stage: int
) -> None:
    config = convolved(tiny_config_module, zero_stage=zero_stage)
    config.launch.processes = 2
    done = run_forked(config, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(finished), rel=1e-6)
    for file in (key_conv_folder.FILE, "model.without_key_conv.safetensors"):
        expected_tensors, tensors = (load_file(run / "model" / file) for run in (finished, tmp_path / "two"))
        assert expected_tensors.keys() == tensors.keys()
        for name in tensors:
            torch.testing.assert_close(tensors[name], expected_tensors[name], rtol=1e-5, atol=1e-6)
