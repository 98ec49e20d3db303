"""The report's curves: losses and throughput over tokens, held-out loss by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moba_train.report.runs import Point, Run
from moba_train.report.theme import DASHES, Draw, Theme, add_legend, line_style
from moba_train.tracking import format_amount

ENLARGED_SHARE = 0.4  # of the tokens, at the end, that an enlarged part shows


@dataclass(frozen=True)
class Curve:
    """A run, or one reading of its held-out set, as a line of a picture with several."""

    name: str  # in the legend
    line: int  # which of the theme's lines
    run: Run
    point: Point | None = None


def draw_losses(run: Run) -> Draw:
    """Training loss and trailing loss over tokens, each step and smoothed, with the held-out readings: the whole run,
    and the last part enlarged."""

    def draw(figure: Figure, theme: Theme) -> None:
        whole, end = figure.subplots(1, 2, width_ratios=(3, 2))
        for color, key, name in (
            (theme.lines[0], "loss", "loss"),
            (theme.lines[1], "trailing_loss", "trailing loss"),
        ):
            _plot_loss(whole, run, key, name, color, theme, first=0)
            _plot_loss(end, run, key, name, color, theme, first=_first_enlarged(run.tokens))
        for axes, ticks in ((whole, 6), (end, 4)):
            _tokens_axis(axes, run.tokens, ticks)
        end.set_xlim(left=_first_enlarged(run.tokens))
        _mark_stages(whole, run, theme)
        _mark_stages(end, run, theme)
        whole.set_ylabel("loss (nats per token)")
        add_legend(figure, whole, 4)

    return draw


def _plot_loss(axes: Axes, run: Run, key: str, name: str, color: str, theme: Theme, first: float) -> None:
    tokens, losses = _series(run, f"train/{key}")
    shown = tokens >= first
    axes.plot(tokens[shown], losses[shown], color=color, alpha=0.3, linewidth=0.9)
    axes.plot(tokens[shown], _smooth(run, f"train/{key}")[shown], color=color, label=f"{name}, training")
    read = [(p.tokens, value) for p in run.points if p.tokens >= first and (value := getattr(p, key)) is not None]
    if read:
        axes.plot(
            *zip(*read, strict=True),
            color=color,
            linestyle="none",
            marker="o",
            markersize=7,
            markerfacecolor=theme.paper,
            markeredgewidth=1.8,
            clip_on=False,
            zorder=5,
            label=f"{name}, held-out",
        )


def draw_position_losses(curves: Sequence[Curve]) -> Draw:
    """Held-out loss by position of the target, one line a reading. Where one was taken before training, the later
    ones are drawn once more without it: a base that fails beyond its context would press them flat."""

    def draw(figure: Figure, theme: Theme) -> None:
        later = [curve for curve in curves if curve.point and curve.point.step > 0]
        views = [curves, later] if 0 < len(later) < len(curves) else [curves]
        panels = figure.subplots(1, len(views), squeeze=False)[0]
        for axes, view in zip(panels, views, strict=True):
            for curve in view:
                _plot_curve(axes, curve, theme)
            context_length = max(curve.run.context_length for curve in curves)
            axes.set_xlim(0, context_length)
            axes.set_xticks(np.linspace(0, context_length, 9 if len(views) == 1 else 5))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
            axes.set_xlabel("position in the document (tokens)")
        panels[0].set_ylabel("held-out loss (nats per token)")
        if len(views) > 1:
            panels[0].set_title("all readings")
            panels[1].set_title("since training began, enlarged")
        add_legend(figure, panels[0], len(curves))

    return draw


def _plot_curve(axes: Axes, curve: Curve, theme: Theme) -> None:
    losses = curve.point.curve if curve.point else {}
    starts = np.array(sorted(losses))
    centres = (starts + np.minimum(starts + curve.run.bin_size, curve.run.context_length)) / 2
    marker = "o" if len(starts) <= 32 else None
    style = line_style(theme, curve.line)
    axes.plot(centres, [losses[start] for start in starts], label=curve.name, marker=marker, markersize=4, **style)


def draw_throughput(run: Run) -> Draw:
    """Tokens a second over tokens."""

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        axes.plot(*_series(run, "perf/tokens_per_second"), color=theme.lines[2])
        axes.set_ylim(bottom=0)
        axes.set_ylabel("tokens per second")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: format_amount(y)))
        _tokens_axis(axes, run.tokens)
        _mark_stages(axes, run, theme)

    return draw


def draw_trailing_overlay(curves: Sequence[Curve]) -> Draw:
    """Every run's smoothed training trailing loss over tokens: all of it, and the last part enlarged."""

    def draw(figure: Figure, theme: Theme) -> None:
        whole, end = figure.subplots(1, 2)
        last = max(curve.run.tokens for curve in curves)
        first = _first_enlarged(last)
        for curve in curves:
            tokens, _ = _series(curve.run, "train/trailing_loss")
            losses = _smooth(curve.run, "train/trailing_loss")
            style = line_style(theme, curve.line)
            whole.plot(tokens, losses, label=curve.name, **style)
            end.plot(tokens[tokens >= first], losses[tokens >= first], **style)
        for axes in (whole, end):
            _tokens_axis(axes, last, ticks=5)
        end.set_xlim(left=first)
        whole.set_title("whole run")
        end.set_title(f"last {ENLARGED_SHARE:.0%} of the tokens, enlarged")
        whole.set_ylabel("trailing loss (nats per token)")
        add_legend(figure, whole, len(curves))

    return draw


def _series(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, values) of the training rows that have ``key``; a value that was not finite leaves a gap."""
    rows = [row for row in run.train_rows if key in row]
    values = [np.nan if row[key] is None else row[key] for row in rows]
    return np.array([row["tokens"] for row in rows]), np.array(values, dtype=float)


def smoothing_window(run: Run) -> int:
    """Logged steps that a smoothed line averages over: about a twentieth of the run, odd so that it is centred."""
    return 1 + 2 * (len(run.train_rows) // 40)


def _smooth(run: Run, key: str) -> np.ndarray:
    """Centred mean over ``smoothing_window`` steps, never across a stage's end, where the loss may jump."""
    rows = [row for row in run.train_rows if key in row]
    _, values = _series(run, key)
    stages = np.array([str(row.get("stage", "")) for row in rows])
    half = smoothing_window(run) // 2
    smoothed = np.empty_like(values)
    for i in range(len(values)):
        near = slice(max(0, i - half), i + half + 1)
        same = values[near][stages[near] == stages[i]]
        smoothed[i] = np.nan if np.isnan(same).all() else np.nanmean(same)
    return smoothed


def _first_enlarged(tokens: int) -> float:
    return (1 - ENLARGED_SHARE) * tokens


def _tokens_axis(axes: Axes, tokens: int, ticks: int = 8) -> None:
    axes.set_xlim(0, max(tokens, 1))
    axes.set_xlabel("tokens trained on")
    axes.xaxis.set_major_locator(MaxNLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_amount(x)))


def _mark_stages(axes: Axes, run: Run, theme: Theme) -> None:
    """A line at each stage's end, and its name above its part of the axes."""
    left, right = axes.get_xlim()
    for span in run.stages:
        first, last = max(span.first_tokens, left), min(span.last_tokens, right)
        if first >= last:
            continue
        axes.annotate(
            span.name,
            ((first + last) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=theme.faint,
        )
        if last < run.tokens:
            axes.axvline(last, color=theme.faint, linewidth=1.0, linestyle=DASHES[1])
