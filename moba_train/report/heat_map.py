"""Trailing loss and speed by block_size and top_k, for sweeps that vary both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from moba_train.report.page import ABSENT, share_text
from moba_train.report.runs import Run
from moba_train.report.theme import LIGHT, Draw, Theme
from moba_train.tracking import format_amount


def heat_map_cells(runs: Sequence[Run]) -> dict[tuple[int, int], list[Run]]:
    """Runs by (block_size, top_k); empty unless both were varied and some run is finished."""
    cells: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        block_size, top_k = run.setting("attention.block_size"), run.setting("attention.top_k")
        if run.setting("attention.kind", "moba") == "moba" and block_size and top_k:
            cells.setdefault((block_size, top_k), []).append(run)
    varied = all(len({key[i] for key in cells}) > 1 for i in (0, 1))
    return cells if varied and any(run.finished for run in runs) else {}


def line_numbers(runs: Sequence[Run]) -> list[int]:
    """Which of the theme's lines each run is: in order, or, for a heat map's runs, colour by block_size and dashes by
    top_k."""
    cells = heat_map_cells(runs)
    if sum(map(len, cells.values())) < len(runs):
        return list(range(len(runs)))
    block_sizes, top_ks = _axes_values(cells)
    numbers = {}
    for block_size, top_k in cells:
        color = block_sizes.index(block_size) % len(LIGHT.lines)
        numbers[block_size, top_k] = color + len(LIGHT.lines) * top_ks.index(top_k)
    return [numbers[run.setting("attention.block_size"), run.setting("attention.top_k")] for run in runs]


def draw_heat_maps(cells: dict[tuple[int, int], list[Run]]) -> Draw:
    """Trailing loss and tokens/s by block_size and top_k, side by side, the sparsity in each cell."""

    def draw(figure: Figure, theme: Theme) -> None:
        left, right = figure.subplots(1, 2)
        _heat_map(left, cells, "trailing_loss", "Trailing loss (nats per token)", "{:.3f}".format, theme, low=True)
        _heat_map(right, cells, "tokens_per_second", "Tokens per second", format_amount, theme, low=False)

    return draw


def _heat_map(
    axes: Axes,
    cells: dict[tuple[int, int], list[Run]],
    attribute: str,
    title: str,
    shown: Callable[[float], str],
    theme: Theme,
    low: bool,
) -> None:
    block_sizes, top_ks = _axes_values(cells)
    grid = np.full((len(top_ks), len(block_sizes)), np.nan)
    for (block_size, top_k), runs in cells.items():
        values = [value for run in runs if run.finished and (value := getattr(run, attribute)) is not None]
        if values:
            grid[top_ks.index(top_k), block_sizes.index(block_size)] = fmean(values)
    colors = LinearSegmentedColormap.from_list("heat", theme.heat[::-1] if low else theme.heat)
    image = axes.imshow(np.ma.masked_invalid(grid), cmap=colors, aspect="auto", origin="lower")
    axes.set_title(title)
    axes.set_xlabel("block_size (tokens)")
    axes.set_ylabel("top_k (blocks a query reads)")
    axes.set_xticks(range(len(block_sizes)), [f"{size:,}" for size in block_sizes])
    axes.set_yticks(range(len(top_ks)), [str(top_k) for top_k in top_ks])
    _separate_cells(axes, grid.shape, theme)
    for (block_size, top_k), runs in cells.items():
        row, column = top_ks.index(top_k), block_sizes.index(block_size)
        value, sparsity = grid[row, column], runs[0].sparsity
        if np.isnan(value):
            text, size, color = ABSENT if any(run.finished for run in runs) else "unfinished", 9, theme.faint
        else:
            text, size, color = shown(value), 12, _readable_on(image.cmap(image.norm(value)))
        centred: dict[str, Any] = {"ha": "center", "va": "center", "color": color}
        axes.text(column, row + 0.08, text, fontsize=size, **centred)
        if sparsity is not None:
            note = share_text(sparsity) + (" sparse" if len(block_sizes) <= 4 else "")
            axes.text(column, row - 0.2, note, fontsize=8, **centred)


def _axes_values(cells: dict[tuple[int, int], list[Run]]) -> tuple[list[int], list[int]]:
    """The block sizes and the top_ks that occur, each rising."""
    return sorted({block_size for block_size, _ in cells}), sorted({top_k for _, top_k in cells})


def _separate_cells(axes: Axes, shape: tuple[int, int], theme: Theme) -> None:
    """A gap of paper between cells, and no frame or tick marks."""
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0)
    axes.set_yticks(np.arange(shape[0] - 1) + 0.5, minor=True)
    axes.set_xticks(np.arange(shape[1] - 1) + 0.5, minor=True)
    axes.grid(False)
    axes.grid(True, which="minor", color=theme.paper, linewidth=3)


def _readable_on(rgba: Any) -> str:
    luminance = 0.2126 * rgba[0] + 0.7152 * rgba[1] + 0.0722 * rgba[2]
    return "#111111" if luminance > 0.45 else "#ffffff"
