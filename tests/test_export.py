"""The exported folder's tokenizer and generation settings are the source's own; the first knows the learnt context."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from moba_train.data.tokenizer import train_tokenizer
from moba_train.export import export
from moba_train.runtime import Runtime
from tiny import TINY_LLAMA


def test_the_source_folders_tokenizer_is_exported(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)  # a group of one
    backend = train_tokenizer(["the white whale"], 298).backend
    backend.add_special_tokens(["<s>", "<pad>"])
    original = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<pad>",
        model_max_length=64,
        chat_template="{{ messages[0].content }}",
    )
    original.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_LLAMA))
    model.config.max_position_embeddings = 256  # as a longer stage leaves it

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "of an earlier export").touch()
    export(model, str(tmp_path / "base"), folder, Runtime(0, 1, 0, torch.device("cpu")))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model"]
    assert not (folder / "of an earlier export").exists()
    exported = AutoTokenizer.from_pretrained(folder)
    assert exported.special_tokens_map == original.special_tokens_map
    assert exported.chat_template == original.chat_template
    assert exported.model_max_length == 256
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_generation_settings_that_contradict_themselves_are_exported(tmp_path: Path, monkeypatch) -> None:
    """Some published models have such; transformers 5.17 refused to write them, when all was trained."""
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    train_tokenizer(["the white whale"], 298).save(tmp_path / "base")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_LLAMA))
    model.save_pretrained(tmp_path / "base")
    settings = {"do_sample": False, "temperature": 0.6, "eos_token_id": 7}
    (tmp_path / "base/generation_config.json").write_text(json.dumps(settings))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    export(loaded, str(tmp_path / "base"), tmp_path / "model", Runtime(0, 1, 0, torch.device("cpu")))
    exported = json.loads((tmp_path / "model/generation_config.json").read_text())
    assert {key: exported[key] for key in settings} == settings
    assert loaded.generation_config.temperature == 0.6
