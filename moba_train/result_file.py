"""A run's result.json: its held-out losses, and how fast it was. It is there once the run is complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moba_train import durable

FILE = "result.json"


def is_there(folder: Path) -> bool:
    """Whether the run in ``folder`` is complete."""
    return (folder / FILE).is_file()


def write(folder: Path, result: dict[str, Any]) -> None:
    """Write it whole or not at all."""
    durable.write(folder / FILE, json.dumps(result, indent=2) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: it is damaged.
    """
    try:
        result = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except ValueError:
        result = None
    if not isinstance(result, dict) or not {"status", "points"} <= result.keys():
        raise ValueError(f"{folder / FILE} is damaged: remove it, and the run makes it again with run.resume=auto")
    return result
