"""What a run is found again by."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest

from moba_train import resolved, result_file, worker
from moba_train.config import Config
from moba_train.metrics_file import read_rows
from moba_train.run import _check_settings


def test_a_checkpoint_of_a_run_with_other_settings_is_refused(tiny_config: Config, tmp_path: Path) -> None:
    state = {"settings": resolved.to_yaml(tiny_config)}
    allowed = deepcopy(tiny_config)
    allowed.run.name, allowed.train.zero_stage, allowed.launch.processes = "copy", 2, 2
    allowed.data.train[0].path, allowed.model.tokenizer = "/elsewhere/train", "/elsewhere/tokenizer.json"
    _check_settings(tmp_path, state, allowed)
    _check_settings(tmp_path, {}, allowed)  # saved before settings were
    allowed.attention.top_k, allowed.model.architecture["hidden_size"] = 7, 64
    with pytest.raises(ValueError, match=r"attention\.top_k: 2 -> 7; model\.architecture\.hidden_size: 32 -> 64"):
        _check_settings(tmp_path, state, allowed)
    with pytest.raises(ValueError, match=rf"{tmp_path}: run.nme: Key 'nme' not in 'RunConfig'; did you mean"):
        _check_settings(tmp_path, {"settings": "run: {nme: x}"}, allowed)  # saved by a moba_train with other keys


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"poi', b"\xff"])
def test_a_damaged_result_is_named(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "result.json").write_bytes(damage)
    with pytest.raises(ValueError, match=r"result\.json is damaged: remove it"):
        result_file.read(tmp_path)


def test_a_run_whose_rows_were_removed_still_has_a_result(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('7\n{"step": 1}\n')
    assert list(read_rows(tmp_path / "metrics.jsonl")) == [{"step": 1}]
    throughput = SimpleNamespace(tokens=0, seconds=0.0)
    worker.write_result(SimpleNamespace(folder=tmp_path, tokens=8, seconds=1.0, throughput=throughput))  # type: ignore[arg-type]
    result = result_file.read(tmp_path)
    assert (result["loss"], result["points"], result["tokens"]) == (None, [], 8)
