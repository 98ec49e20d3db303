"""Read a run's metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of ``file``, in order; what is none, such as a last line cut short by a kill, is left out."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            yield row
