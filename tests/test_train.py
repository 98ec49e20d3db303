"""Whole runs of the tiny model, each in a process of its own."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from moba_train.config import Config
from moba_train.data.loader import heldout_batches
from moba_train.data.store import TokenStore
from moba_train.data.tokens import prepare_store
from moba_train.metrics_file import read_rows
from tiny import checkpoint_tensors, run_forked, run_worker


@pytest.fixture(scope="module")
def finished(tiny_config_module: Config, tmp_path_factory) -> Path:
    """A run of six steps in two stages, with every checkpoint kept."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = run_worker(tiny_config_module, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_rows_tell_the_whole_run(finished: Path) -> None:
    rows = list(read_rows(finished / "metrics.jsonl"))
    steps = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens"] for row in steps] == [512 * n for n in range(1, 7)]
    assert [row["stage"] for row in steps] == ["moba"] * 4 + ["full"] * 2
    assert all({"train/trailing_loss", "train/gradient_norm", "perf/tokens_per_second"} <= row.keys() for row in steps)
    assert all(row["perf/tokens_per_second"] > 0 and row["train/skipped_steps"] == 0 for row in steps)
    curves = {row["step"]: sum(key.startswith("train/position_loss/") for key in row) for row in steps}
    assert curves == {1: 0, 2: 0, 3: 128 // 32, 4: 0, 5: 0, 6: 256 // 32}
    drawn = {"data/epoch", "data/padding", "data/epoch/train", "data/share/train", "perf/data_seconds"}
    assert all(drawn <= row.keys() for row in steps)
    epochs = [row["data/epoch"] for row in steps]  # each stage begins with its own first row
    assert epochs == pytest.approx([n * epochs[0] for n in (1, 2, 3, 4)] + [n * epochs[4] for n in (1, 2)])
    assert [row["perf/sparsity"] for row in steps] == [0.75] * 4 + [0.0] * 2
    points = [(row["eval/point"], row["step"]) for row in rows if "eval/point" in row]
    assert points == [("start", 0), ("moba", 4), ("full", 6)]
    curve = [key for key in rows[0] if key.startswith("eval/position_loss/")]
    assert len(curve) == 256 // 32


def test_learning_lowers_the_loss(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["status"] == "completed"
    losses = [point["trailing_loss"] for point in result["points"]]
    assert losses[0] > losses[1] > losses[2]
    assert result["trailing_loss"] == losses[2]


@pytest.mark.parametrize("step", [2, 4], ids=["inside a stage", "at a stage's edge"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    finished: Path, tiny_config_module: Config, tmp_path: Path, step: int
) -> None:
    folder = tmp_path / "resumed"
    shutil.copytree(finished / "checkpoints" / f"step_{step:08d}", folder / "checkpoints" / f"step_{step:08d}")
    shutil.copy(finished / "metrics.jsonl", folder)  # rows beyond the checkpoint are cut off
    done = run_forked(tiny_config_module, folder)
    assert done.returncode == 0, done.stderr
    assert f"resumed at step {step}" in done.stderr

    expected = checkpoint_tensors(finished / "checkpoints" / "step_00000006")
    got = checkpoint_tensors(folder / "checkpoints" / "step_00000006")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert any("exp_avg" in name for name in expected)
    generators = "checkpoints/step_00000006/rank_00000.json"
    assert (folder / generators).read_text() == (finished / generators).read_text()

    def losses(run: Path) -> list[tuple]:
        return [(row["step"], row.get("train/loss"), row.get("eval/loss")) for row in read_rows(run / "metrics.jsonl")]

    assert losses(folder) == losses(finished)


def test_a_resumed_run_needs_its_store_and_not_its_documents(
    finished: Path, tiny_config_module: Config, tmp_path: Path
) -> None:
    """Documents that are gone: it goes on from the store. Other documents, or other settings than those of a checkpoint
    that was copied here: refused, nothing touched."""
    config = copy.deepcopy(tiny_config_module)
    config.data.store_dir = str(tmp_path / "store")
    prepare_store(config.data, str(config.model.tokenizer), progress=False)
    folder = tmp_path / "run"
    shutil.copytree(finished / "checkpoints" / "step_00000004", folder / "checkpoints" / "step_00000004")
    documents = Path(config.data.train[0].path)
    documents.rename(tmp_path / "away")
    try:
        done = run_forked(config, folder)
    finally:
        (tmp_path / "away").rename(documents)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 4" in done.stderr

    first = min(documents.iterdir())
    text = first.read_text()
    config.data.rebuild = True
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.suffix in (".json", ".jsonl")}
    first.write_text(text[::-1])
    try:
        done = run_forked(config, folder)
    finally:
        first.write_text(text)
    assert done.returncode != 0
    assert "is not the one this run was started on (its tokens differ): restore the documents" in done.stderr
    assert (folder / "metrics.jsonl").read_bytes() == before[folder / "metrics.jsonl"]

    config.attention.top_k = 3
    done = run_forked(config, folder)
    assert done.returncode != 0
    assert "was saved by a run with other settings (attention.top_k: 2 -> 3)" in done.stderr
    assert (folder / "metrics.jsonl").read_bytes() == before[folder / "metrics.jsonl"]


def test_the_export_loads_without_this_package(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert model.config.max_position_embeddings == 256
    state = torch.load(finished / "checkpoints/step_00000006/engine/mp_rank_00_model_states.pt", weights_only=False)[
        "module"
    ]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[f"model.{name}"])
    ids = tokenizer("the white whale", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


def test_the_export_has_the_losses_that_the_run_read_last(finished: Path, tiny_config_module: Config) -> None:
    """By plain transformers, whose logits are whole: attention, RoPE, rows, bins and export in one."""
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    assert model.config.rope_parameters["rope_theta"] == 20000.0
    stores = prepare_store(tiny_config_module.data, str(tiny_config_module.model.tokenizer), progress=False)
    ids = torch.cat([batch.input_ids for batch in heldout_batches(TokenStore.open(stores / "heldout"), 256, rows=2)])
    with torch.no_grad():
        losses = F.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    row = list(read_rows(finished / "metrics.jsonl"))[-1]
    assert row["eval/loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert row["eval/trailing_loss"] == pytest.approx(float(losses[:, -32:].mean()), rel=1e-5)
    bins = [losses[:, max(0, start - 1) : start + 31].mean() for start in range(0, 256, 32)]  # by target: 1, 2, …
    found = [row[f"eval/position_loss/{start:06d}"] for start in range(0, 256, 32)]
    assert found == pytest.approx([float(each) for each in bins], rel=1e-5)


def test_a_damaged_newest_checkpoint_is_passed_over(finished: Path, tiny_config_module: Config, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    for step in (2, 4):
        shutil.copytree(finished / "checkpoints" / f"step_{step:08d}", folder / "checkpoints" / f"step_{step:08d}")
    victim = next((folder / "checkpoints/step_00000004/engine").iterdir())
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    done = run_forked(tiny_config_module, folder)
    assert done.returncode == 0, done.stderr
    assert "does not match its SHA-256" in done.stderr and victim.name in done.stderr
    assert "resumed at step 2" in done.stderr
