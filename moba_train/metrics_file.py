"""Read a run's metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of ``file``, in order; a last line cut short by a kill is left out."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
