"""How far the making of a split is, on the console."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from moba_train.data.split import Origin, Split


@contextmanager
def progress_bar(split: Split, shown: bool) -> Iterator[Callable[[Origin, int], None]]:
    """A bar over the bytes of the split's files, and the tokens so far."""
    sizes = [[file.bytes for file in files] for _, files in split.sources]
    before = np.cumsum([0, *(sum(files) for files in sizes)])
    within = [np.cumsum([0, *files]) for files in sizes]
    bar = Progress(
        TextColumn("tokenising {task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(),
        disable=not shown,
    )
    task: TaskID = bar.add_task(split.name, total=float(before[-1]) or None, tokens=0)
    total = 0

    def advance(origin: Origin, tokens: int) -> None:
        nonlocal total
        total += tokens
        files = sizes[origin.source]
        share = files[origin.file] * origin.share_read if files else 0.0
        done = before[origin.source] + within[origin.source][origin.file if files else 0] + share
        bar.update(task, completed=float(done), tokens=total)

    with bar:
        yield advance
