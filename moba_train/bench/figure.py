"""A measurement as a picture: growth with length where one shape was measured at several, else a bar a case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from moba_train.bench.table import ratios
from moba_train.report.data_figure import format_length
from moba_train.report.theme import Theme, line_style, render

Row = Mapping[str, Any]
_SHAPE = ("sequences", "heads", "kv_heads", "head_dim", "block_size", "top_k", "dtype")
_PASSES = ("forward", "forward + backward")


def picture(result: Mapping[str, Any]) -> bytes | None:
    """A PNG; None where no implementation beside dense has times."""
    rows = [row for row in result["cases"] if any(ratios(row, name) for name in row["columns"] if name != "dense")]
    if not rows:
        return None
    growth = len(rows) > 2 and len({tuple(row[key] for key in _SHAPE) for row in rows}) == 1

    def draw(figure: Figure, theme: Theme) -> None:
        for at, axes in enumerate(figure.subplots(1, 2)):
            (_draw_growth if growth else _draw_ratios)(axes, rows, at, theme)
            axes.set_title(_PASSES[at])
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)))

    return render("bench", draw, 3.9, "Time of attention beside dense attention", "").light


def _draw_growth(axes: Axes, rows: Sequence[Row], at: int, theme: Theme) -> None:
    """Milliseconds over tokens, both logarithmic."""
    for index, name in enumerate(_names(rows)):
        points = [(row["length"], row["columns"][name]["times"][at]) for row in rows if row["columns"][name]["times"]]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **line_style(theme, index))
    axes.set_xscale("log", base=2)
    _log_scale(axes)
    lengths = sorted(row["length"] for row in rows)
    axes.set_xticks(lengths, [format_length(length) for length in lengths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds")


def _draw_ratios(axes: Axes, rows: Sequence[Row], at: int, theme: Theme) -> None:
    """Times faster than dense, a group of bars a case, logarithmic."""
    names = _names(rows)[1:]
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        found = [(i, ratio[at]) for i, row in enumerate(rows) if (ratio := ratios(row, name))]
        places = [i + width * (index - (len(names) - 1) / 2) for i, _ in found]
        bars = axes.bar(places, [r for _, r in found], 0.94 * width, label=name, color=theme.lines[index])
        axes.bar_label(bars, fmt="%.3gx", fontsize=8, padding=1)
    axes.axhline(1, color=theme.faint, linewidth=1)
    _log_scale(axes)
    axes.margins(y=0.15)
    axes.set_xticks(
        range(len(rows)), [f"{row['name']}\n{row['block_size']}, {row['top_k']}" for row in rows], fontsize=8
    )
    axes.grid(False, axis="x")
    axes.set_xlabel("case; block, top-k")
    axes.set_ylabel("times faster than dense")


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # matplotlib's own is TeX
    axes.yaxis.set_minor_formatter(NullFormatter())


def _names(rows: Sequence[Row]) -> list[str]:
    """dense, and whatever else has times somewhere."""
    named = dict.fromkeys(name for row in rows for name in row["columns"])
    return [name for name in named if any(row["columns"][name]["times"] for row in rows)]
