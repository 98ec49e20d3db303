"""The page of several runs: a table, a block_size x top_k heat map where both vary, curves over one another."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from moba_train.report import figures
from moba_train.report.figures import Curve
from moba_train.report.heat_map import draw_heat_maps, heat_map_cells, line_numbers
from moba_train.report.page import Cell, Picture, Section, Table, html, loss_text, rate_text, share_text
from moba_train.report.runs import Run
from moba_train.report.theme import render
from moba_train.tracking import format_amount


def comparison_page(runs: list[Run], paths: list[Path]) -> tuple[str, list[Picture]]:
    """The HTML of the page and its pictures; ``paths`` are where the runs were found, for titles and captions."""
    where = ", ".join(path.name for path in paths)
    names = _short_names(runs)
    pictures, sections = [], [Section("Runs", [_runs_table(runs, names)])]
    if cells := heat_map_cells(runs):
        pictures.append(
            render(
                "heat_map",
                draw_heat_maps(cells),
                1.5 + 0.75 * len({top_k for _, top_k in cells}),
                "Trailing loss and tokens per second by block_size and top_k",
                "Left: held-out trailing loss, lower is better; right: training tokens per second. Stronger colour is "
                "better in both. Below in each cell: the sparsity, 1 - top_k x block_size / context length. A cell "
                f"with several runs shows their mean. From result.json and metrics.jsonl of each run in {where}.",
            )
        )
        sections.append(Section("block_size x top_k", [pictures[-1]]))
    lines = [Curve(*labelled) for labelled in zip(names, line_numbers(runs), runs, strict=True)]
    if trained := [line for line in lines if line.run.train_rows]:
        pictures.append(
            render(
                "trailing_loss",
                figures.draw_trailing_overlay(trained),
                4.2,
                "Trailing loss of every run over tokens",
                "Trailing loss in training, averaged over about a twentieth of each run's logged steps, never across a "
                f"stage's end. From metrics.jsonl of each run in {where}.",
            )
        )
        sections.append(Section("Trailing loss", [pictures[-1]]))
    readings = [replace(line, point=line.run.points[-1]) for line in lines if line.run.points]
    if curves := [reading for reading in readings if reading.point and reading.point.step and reading.point.curve]:
        pictures.append(
            render(
                "position_loss",
                figures.draw_position_losses(curves),
                4.2,
                "Last held-out loss by position of every run",
                "Held-out loss by the position of the predicted token, at each run's last reading of the held-out "
                f"set. From metrics.jsonl of each run in {where}.",
            )
        )
        sections.append(Section("Loss by position", [pictures[-1]]))
    labels = sorted({run.label for run in runs})
    of = " and ".join(labels) if len(labels) <= 3 else f"{len(labels)} recipes"
    unfinished = sum(not run.finished for run in runs)
    lead = f"{len(runs)} runs of {of}" + (f", {unfinished} of them unfinished" if unfinished else "")
    return html(where, "", lead + ".", [], sections, ""), pictures


def _runs_table(runs: list[Run], names: list[str]) -> Table:
    finished = [run for run in runs if run.finished]
    best = {
        key: choose((value for run in finished if (value := getattr(run, key)) is not None), default=None)
        for key, choose in (("loss", min), ("trailing_loss", min), ("tokens_per_second", max))
    }
    recipes = len({run.label for run in runs}) > 1

    def cell(run: Run, key: str, text: str) -> Cell:
        value = getattr(run, key)
        return Cell(text, best=run.finished and value is not None and value == best[key])

    rows: list[list[str | Cell]] = [
        [
            name,
            *([run.label] if recipes else []),
            cell(run, "loss", loss_text(run.loss)),
            cell(run, "trailing_loss", loss_text(run.trailing_loss)),
            cell(run, "tokens_per_second", rate_text(run.tokens_per_second)),
            share_text(run.sparsity),
            format_amount(run.tokens),
            run.status,
        ]
        for name, run in zip(names, runs, strict=True)
    ]
    columns = ["#loss", "#trailing loss", "#tokens/s", "#sparsity", "#tokens", "status"]
    return Table(
        ["run", *(["recipe"] if recipes else []), *columns],
        rows,
        "Losses in nats per token on the held-out set, at the last reading; sparsity of the sparsest stage; the best "
        "finished run of each column in bold.",
    )


def _short_names(runs: list[Run]) -> list[str]:
    """Overrides with the last word of each key (``block_size=64, top_k=2``) where that still tells the runs apart."""
    short = [
        ", ".join(override.split("=")[0].rpartition(".")[2] + "=" + override.partition("=")[2] for override in parts)
        if (parts := re.split(r",(?=[\w.@/+~]+=)", run.overrides)) != [""]
        else run.name
        for run in runs
    ]
    return short if len(set(short)) == len(runs) else [run.name for run in runs]
