"""Runs → one self-contained HTML page, with its pictures as PNG files beside it.

One run is told as a story (loss and trailing loss over tokens, held-out loss by position, throughput); several, or a
multirun directory, are compared (a table, trailing losses in one picture, a block_size x top_k heat map where both
were varied).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moba_train import durable
from moba_train.report.comparison import comparison_page
from moba_train.report.runs import read_runs
from moba_train.report.single import single_page

PAGE = "index.html"


def build(paths: Path | Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of a run, of a multirun directory, or of several of either.

    Args:
        paths: run directories (resolved.yaml, metrics.jsonl, result.json once finished) or their parents
        out: directory for the page and the PNG files; ``report/`` in the only path where not given

    Returns:
        the page, ``<out>/index.html``

    Raises:
        ValueError: a path without runs, no step and no evaluation logged yet, or several paths without ``out``
    """
    paths = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    if out is None and len(paths) != 1:
        raise ValueError(f"{len(paths)} paths and no place for their report; name an output directory")
    out = Path(out) if out is not None else paths[0] / "report"
    runs = read_runs(paths)
    if not any(run.rows for run in runs):
        raise ValueError(f"run={paths[0]}: metrics.jsonl holds no row; report after the first step")
    single = len(runs) == 1 and runs[0].path == paths[0]
    page, pictures = single_page(runs[0]) if single else comparison_page(runs, paths)
    out.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        durable.write(out / f"{picture.stem}.png", picture.light)
        durable.write(out / f"{picture.stem}-dark.png", picture.dark)
    durable.write(out / PAGE, page)
    return out / PAGE
