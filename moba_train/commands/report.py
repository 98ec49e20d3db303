"""Write the report of a run or of a sweep: moba-train report run=DIRECTORY [out=DIRECTORY]

run   a run directory, or a multirun directory with one run directory a point
out   where the page and its pictures go; DIRECTORY/report where it is not given
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from moba_train import report
from moba_train.commands.arguments import parse


@dataclass
class ReportArguments:
    run: str = MISSING
    out: str | None = None


def main(arguments: list[str]) -> int:
    given = parse(ReportArguments, arguments, "report run=DIRECTORY")
    page = report.build(Path(given.run).expanduser(), Path(given.out).expanduser() if given.out else None)
    print(f"report: {page}")
    return 0
