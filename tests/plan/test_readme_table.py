"""The README's table of planned runs is what scripts/plan_table.py prints today."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_is_as_planned(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "scripts" / "plan_table.py"), run_name="__main__")
    table = capsys.readouterr().out.strip()
    assert len(table.splitlines()) == 6
    assert table in (ROOT / "README.md").read_text(encoding="utf-8"), "write it again: python scripts/plan_table.py"
