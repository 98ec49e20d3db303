"""Colours, type and rendering that every picture of the report shares.

Colours are Okabe and Ito's palette (told apart under every common colour blindness), paler on dark; more than seven
lines are told apart by dashes too.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moba_train.report.page import Picture

DPI = 150
_WIDTH = 8.8  # inches


@dataclass(frozen=True)
class Theme:
    """Colours of one page background."""

    paper: str
    ink: str
    faint: str
    grid: str
    lines: tuple[str, ...]
    heat: tuple[str, str]  # of heat maps, from the worse end to the better one


LIGHT = Theme(
    paper="#ffffff",
    ink="#1f2328",
    faint="#6b7280",
    grid="#e5e7eb",
    lines=("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555"),
    heat=("#eef4f8", "#0072B2"),
)
DARK = Theme(
    paper="#161b22",
    ink="#e6edf3",
    faint="#8b949e",
    grid="#2d333b",
    lines=("#56B4E9", "#F0803C", "#2CC295", "#E3A1C6", "#F0C042", "#B692FF", "#C9D1D9"),
    heat=("#1f2933", "#4aa3dc"),
)
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))

Draw = Callable[[Figure, Theme], None]


def render(stem: str, draw: Draw, height: float, alt: str, caption: str) -> Picture:
    """Draw once for each background; ``height`` in inches."""
    light, dark = (_png(draw, height, theme) for theme in (LIGHT, DARK))
    return Picture(stem, light, dark, alt, caption)


def _png(draw: Draw, height: float, theme: Theme) -> bytes:
    style: dict[Any, Any] = {
        "text.parse_math": False,  # a run's name is not TeX
        "font.size": 9.5,
        "text.color": theme.ink,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.faint,
        "axes.labelcolor": theme.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "legend.facecolor": theme.paper,
        "legend.edgecolor": "none",
        "legend.framealpha": 0.85,
        "legend.fontsize": 9,
        "lines.linewidth": 1.8,
        "figure.constrained_layout.w_pad": 0.08,
        "figure.constrained_layout.h_pad": 0.08,
        "lines.solid_capstyle": "round",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height), facecolor=theme.paper, layout="constrained")
        draw(figure, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, facecolor=theme.paper)
    return buffer.getvalue()


def line_style(theme: Theme, i: int) -> dict[str, Any]:
    """Colour and dashes of line ``i`` of many."""
    colors = len(theme.lines)
    return {"color": theme.lines[i % colors], "linestyle": DASHES[i // colors % len(DASHES)]}


def add_legend(figure: Figure, axes: Axes, lines: int) -> None:
    """Inside ``axes`` while short; below the figure, in as many columns as fit, when long or beside other axes."""
    if lines <= 4 and len(figure.axes) == 1:
        axes.legend()
        return
    handles, names = axes.get_legend_handles_labels()
    fitting = max(1, 130 // (max(map(len, names)) + 8))
    columns = math.ceil(lines / math.ceil(lines / fitting))  # even rows
    figure.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=2.6)
