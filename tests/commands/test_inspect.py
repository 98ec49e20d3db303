"""moba-train inspect: the tables say what the store and the stages hold."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from moba_train.cli import run
from moba_train.commands.inspect import show
from moba_train.config import Config, MixConfig, SourceConfig


def printed(config: Config) -> str:
    console = Console(file=io.StringIO(), width=200)
    picture = show(config, console)
    assert picture.read_bytes().startswith(b"\x89PNG")
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_tables_and_picture(tiny_config: Config) -> None:
    text = printed(tiny_config)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert ["train", "3"] in [row[:2] for row in rows]
    assert ["heldout", "1"] in [row[:2] for row in rows]
    assert "stage moba: 4 steps, 16 rows of 128 tokens" in text
    assert "stage full: 2 steps, 4 rows of 256 tokens" in text
    assert "left out" not in text


def test_names_with_brackets_are_no_markup(tiny_config: Config, tmp_path: Path, monkeypatch) -> None:
    tiny_config.data.store_dir = str(tmp_path / "[old]" / "[/]")
    tiny_config.data.train[0].name = "[/web]$a_$"  # a $ is no formula in the picture
    text = printed(tiny_config)
    assert f"train: {tmp_path}/[old]/[/]/" in text and text.count("│ [/web]$a_$ │") == 3
    monkeypatch.setattr(Path, "write_bytes", lambda *_: Path("/proc/picture").touch())
    console = Console(file=io.StringIO(), width=200)
    assert show(tiny_config, console) is None, "others' store is shown too, without a picture"
    assert "/inspect.png cannot be written (" in console.file.getvalue()  # type: ignore[attr-defined]


def test_mixes_of_stages(tiny_config: Config) -> None:
    folder = tiny_config.data.train[0].path
    tiny_config.data.train = [
        SourceConfig(name="long", path=f"{folder}/a.txt"),
        SourceConfig(name="rest", path=f"{folder}/[bc].txt"),
        SourceConfig(name="again", path=folder),
    ]
    tiny_config.data.mix = MixConfig(weights={"long": 3.0, "rest": 1.0})
    tiny_config.schedule.stages[1].mix = MixConfig(full_rows=1.0)
    with pytest.raises(ValueError, match="leaves no document of source 'again'"):
        tiny_config.data.mix.weights["again"] = 1.0  # its documents are the other sources'
        printed(tiny_config)
    del tiny_config.data.mix.weights["again"]
    text = printed(tiny_config)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert ["again", "3", "3"] in rows  # left out: 3 records, 3 of them duplicates
    assert next(row[2] for row in rows if row[0] == "long" and row[2].endswith("%")) == "75.0%"
    assert "100.0% of them one full-length segment, 0.00% padding" in text


@pytest.mark.parametrize("setting", ["train.tokens_per_step=0", "data.name=../outside"])
def test_bad_settings_are_refused_first(setting: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", setting, f"data.store_dir={tmp_path}/store"]) == 2
    key, value = setting.split("=")
    message = capfd.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: {key}=") and value in message
    assert not list(tmp_path.iterdir())
