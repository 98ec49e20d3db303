"""moba-train prepare: says what became of the documents."""

from __future__ import annotations

import pytest

from moba_train.cli import run
from moba_train.config import Config, SourceConfig


def test_says_what_was_left_out_and_that_there_is_nothing_to_do(
    tiny_config: Config, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_config.data.train[0].path
    sources = [SourceConfig(name="once", path=f"{folder}/a.txt"), SourceConfig(name="again", path=folder)]
    overrides = [
        "data=none",
        f"data.train=[{','.join(f'{{name: {source.name}, path: {source.path}}}' for source in sources)}]",
        f"data.heldout=[{{name: held, path: {tiny_config.data.heldout[0].path}}}]",
        f"data.store_dir={tiny_config.data.store_dir}",
        f"model.tokenizer={tiny_config.model.tokenizer}",
    ]
    assert run(["prepare", *overrides]) == 0
    printed = capfd.readouterr().out
    assert "train: 3 documents, " in printed and "heldout: 1 documents, " in printed
    assert "  left out of again's 3 records: 1 duplicate\n" in printed
    assert "nothing to prepare" not in caplog.text
    assert run(["prepare", *overrides]) == 0
    assert caplog.text.endswith(" is complete: nothing to prepare\n")
