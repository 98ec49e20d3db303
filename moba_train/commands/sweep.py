"""What became of the points of a sweep: each leaves a note in the sweep's directory, from whichever machine ran it."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from moba_train import durable

STARTED = "MOBA_TRAIN_SWEEP"  # in the environment of the points: which start of the sweep they belong to
_FOLDER = ".points"


@dataclass(frozen=True)
class Point:
    """How a point ended."""

    number: int
    code: int  # the exit code
    error: str | None  # of one that was refused
    started: str = ""
    process: str = ""


def note(sweep: Path, number: int, code: int, error: str | None) -> None:
    """Leave the note of a point."""
    folder = sweep / _FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    point = Point(number, code, error, os.environ.get(STARTED, ""), _process())
    durable.write(folder / f"{number}.json", json.dumps(asdict(point)))


def read(sweep: Path) -> list[Point]:
    """The notes of this start's points, by number; those of an earlier start of the same name are left out."""
    points = [Point(**json.loads(file.read_text())) for file in (sweep / _FOLDER).glob("*.json")]
    return sorted((point for point in points if point.started == os.environ[STARTED]), key=lambda point: point.number)


def exit_code(sweep: Path) -> int:
    """The first failed point's, else 0. What a point was refused for elsewhere is said here."""
    points = read(sweep)
    for point in points:
        if point.error and point.process != _process():
            print(f"error: point {point.number}: {point.error}", file=sys.stderr)
    return next((point.code for point in points if point.code), 0)


def _process() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"
