"""Run directories as the report reads them: resolved.yaml, metrics.jsonl and, once finished, result.json."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

from moba_train import metrics_file, resolved, result_file

_CURVE_KEY = "eval/position_loss/"


@dataclass(frozen=True)
class Point:
    """One reading of the held-out set. Losses in nats a token; None where they were not finite or not measured."""

    name: str  # "start", a stage's name (read at its end) or "step"
    step: int
    tokens: int
    loss: float | None
    trailing_loss: float | None
    curve: dict[int, float] = field(default_factory=dict)  # first position of a bin → mean loss


@dataclass(frozen=True)
class StageSpan:
    """The steps logged in one stage; tokens are the run's totals."""

    name: str
    first_tokens: int
    last_tokens: int
    tokens_per_second: float | None
    sparsity: float | None
    model_flop_utilization: float | None


@dataclass(frozen=True)
class Run:
    """One run directory."""

    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]  # metrics.jsonl in order
    result: dict[str, Any] | None

    @property
    def label(self) -> str:
        return str(self.setting("run.label", self.path.name))

    @property
    def overrides(self) -> str:
        """What a multirun changed for this run: its directory's name behind the number, all of it in a named sweep;
        empty for a single run."""
        match = re.fullmatch(r"\d+_(.+)", self.path.name)
        if match is None and (self.path.parent / "multirun.yaml").is_file():
            return self.path.name
        return match[1] if match else ""

    @property
    def name(self) -> str:
        """What tells this run from the others of its page."""
        return self.overrides or self.path.name

    @property
    def status(self) -> str:
        """result.json's, or ``unfinished`` where there is none."""
        return str(self.result["status"]) if self.result else "unfinished"

    @property
    def finished(self) -> bool:
        return self.result is not None

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of resolved.yaml by its dotted name."""
        node: Any = self.config
        for part in key.split("."):
            if not isinstance(node, dict) or node.get(part) is None:
                return default
            node = node[part]
        return node

    @property
    def bin_size(self) -> int:
        """Positions of a loss bin, and of the trailing loss."""
        return int(self.setting("position_loss.bin_size", 2048))

    @property
    def context_length(self) -> int:
        """The longest of the schedule, at which the held-out set is read."""
        return max((int(stage["context_length"]) for stage in self.setting("schedule.stages", [])), default=1)

    @cached_property
    def train_rows(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "train/loss" in row]

    @cached_property
    def points(self) -> list[Point]:
        """Readings of the held-out set in order."""
        return [
            Point(
                name=str(row["eval/point"]),
                step=row["step"],
                tokens=row["tokens"],
                loss=row.get("eval/loss"),
                trailing_loss=row.get("eval/trailing_loss"),
                curve={
                    int(key.removeprefix(_CURVE_KEY)): value
                    for key, value in row.items()
                    if key.startswith(_CURVE_KEY) and value is not None
                },
            )
            for row in self.rows
            if "eval/point" in row
        ]

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.rows[-1]["tokens"] if self.rows else 0

    @cached_property
    def stages(self) -> list[StageSpan]:
        """Stages that steps were logged in, in order."""
        spans, before = [], 0
        for name, rows in groupby(self.train_rows, key=lambda row: str(row.get("stage", ""))):
            group = list(rows)
            spans.append(
                StageSpan(
                    name=name,
                    first_tokens=before,
                    last_tokens=group[-1]["tokens"],
                    tokens_per_second=_mean(group, "perf/tokens_per_second"),
                    sparsity=_mean(group, "perf/sparsity"),
                    model_flop_utilization=_mean(group, "perf/model_flop_utilization"),
                )
            )
            before = group[-1]["tokens"]
        return spans

    @property
    def loss(self) -> float | None:
        return self._final("loss")

    @property
    def trailing_loss(self) -> float | None:
        return self._final("trailing_loss")

    def _final(self, key: str) -> float | None:
        """The run's own result, or the last reading of the held-out set since training began."""
        if self.result and self.result.get(key) is not None:
            return self.result[key]
        return getattr(self.points[-1], key) if self.points and self.points[-1].step else None

    @property
    def tokens_per_second(self) -> float | None:
        if self.result and self.result.get("tokens_per_second") is not None:
            return self.result["tokens_per_second"]
        return _mean(self.train_rows, "perf/tokens_per_second")

    @property
    def sparsity(self) -> float | None:
        """Of the sparsest stage."""
        return max((span.sparsity for span in self.stages if span.sparsity is not None), default=None)

    @property
    def memory_gb(self) -> float | None:
        return max((v for row in self.rows if (v := row.get("perf/memory_gb")) is not None), default=None)


def read_runs(paths: list[Path]) -> list[Run]:
    """Every run at or directly below ``paths``; a multirun's in the order of the numbers in their names.

    Raises:
        ValueError: a path that does not exist or holds no run
    """
    runs = []
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"run={path} is not a directory; give a run or multirun directory")
        if _is_run(path):
            runs.append(_read_run(path))
            continue
        children = sorted((child for child in path.iterdir() if child.is_dir() and _is_run(child)), key=_order)
        if not children:
            raise ValueError(f"run={path} holds no run (no resolved.yaml in it or one level below)")
        runs += [_read_run(child) for child in children]
    return runs


def _is_run(path: Path) -> bool:
    return (path / resolved.FILE).is_file()


def _order(path: Path) -> list[str | int]:
    """Numbers count as such wherever they stand: 0_x, 1_x, 10_x; top_k=2, top_k=16."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _read_run(path: Path) -> Run:
    config: Any = OmegaConf.to_container(resolved.read(path / resolved.FILE))
    result = result_file.read(path) if result_file.is_there(path) else None
    metrics = path / metrics_file.FILE  # not there yet where a run stopped before its first row
    rows = metrics_file.read_rows(metrics) if metrics.is_file() else []
    return Run(path, config, [row for row in rows if "tokens" in row], result)


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return fmean(values) if values else None
