"""moba-train plan: composed as train is, without a GPU, a hub or the model's files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moba_train.cli import run

SMALL = ["model=llama3_1b", "train.precision=bf16", "train.zero_stage=1"]


def test_tables_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert run(["plan", *SMALL, "plan.memory_gb=20", f"output={file}"]) == 0
    text = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert "1.24 billion parameters on 1 H200 of 20 GB" in text and "It does not fit" in text
    assert not found["fits"] and found["gpus"] == 1
    assert [stage["name"] for stage in found["stages"]] == ["moba", "full"]
    for stage in found["stages"]:
        memory = stage["memory_bytes"]
        assert memory["peak"] == pytest.approx(sum(memory["moments"][memory["peak_moment"]].values()))
        times = stage["step_seconds"]
        assert times.pop("total") == pytest.approx(sum(times.values()))
    assert all(switch["saved_bytes"] > 0 and switch["settings"].split("=")[0] in text for switch in found["switches"])


def test_host_memory_that_is_not_known_and_too_little(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    offloaded = [*SMALL, "train.activation_checkpointing=true", "train.offload.moments=true", f"output={file}"]
    for given, fits, words in (
        ([], None, "It fits the GPU, if a node has 10 GB of memory to pin"),
        (["plan.host_memory_gb=11"], True, "It fits. The schedule"),
        (["plan.host_memory_gb=9"], False, "It does not fit: 9.9 GB of a node's 9"),
    ):
        assert run(["plan", *offloaded, *given]) == 0
        assert words in capsys.readouterr().out
        assert json.loads(file.read_text())["fits"] is fits


def test_a_long_run_counts_its_hours_in_whole_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "experiment=llama3_8b_1m", "launch.nodes=4"]) == 0
    assert re.search(r"takes [\d.]+ d, \d\d,\d\d\d GPU hours", capsys.readouterr().out)


def test_a_folder_with_its_configuration_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 512,
        "head_dim": 64,
        "intermediate_size": 1024,
    }
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(small | heads))
    assert run(["plan", "model=none", *SMALL[1:], f"model.path={tmp_path}", "model.name=mine"]) == 0
    assert "mine: 0.01 billion parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "train.precision=fp32 is not planned, GPUs are given bf16"),
        ([*SMALL, "plan.gpu=H900"], "plan.gpu=H900 is unknown: choose from H200"),
        ([*SMALL, "plan.speed=2"], "plan.speed"),
        ([*SMALL, "launch.gpus=3"], "launch.gpus=3"),
        ([*SMALL, "model.architecture.num_hidden_layers=-1"], "num_hidden_layers"),
    ],
)
def test_bad_settings_are_one_line(arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *arguments]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and words in lines[-1]
