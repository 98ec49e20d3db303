"""A picture of a data set: its tokens by document length and source, and what each stage draws of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from moba_train.data.survey import Holding, SourceDraw
from moba_train.report.theme import Theme, render
from moba_train.tracking import format_amount


def data_picture(name: str, holdings: Sequence[Holding], stages: Mapping[str, Sequence[SourceDraw]]) -> bytes:
    """A PNG. ``holdings`` as `survey.holdings` gives them; ``stages``: what each draws, by its name."""
    sources = list(holdings[:-1] or holdings)

    def draw(figure: Figure, theme: Theme) -> None:
        lengths, mixes = figure.subplots(1, 2, width_ratios=(3, 2))
        # Beyond as many sources as there are colours, the smallest share the last one.
        largest = sorted(sources, key=lambda source: -source.tokens)
        color = {s.name: theme.lines[min(i, len(theme.lines) - 1)] for i, s in enumerate(largest)}
        _draw_lengths(lengths, sources, color, theme)
        _draw_mixes(mixes, sources, stages, color, theme)
        handles, names = lengths.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)))

    height = 3.6 + 0.25 * (len(sources) // 5)
    return render("data", draw, height, f"Document lengths and mixes of {name}", "").light


def _draw_lengths(axes: Axes, sources: Sequence[Holding], color: Mapping[str, str], theme: Theme) -> None:
    bins = len(sources[0].tokens_by_bin)
    first = min(int((source.tokens_by_bin > 0).argmax()) for source in sources if source.documents)
    below = np.zeros(bins)
    for source in sources:
        axes.bar(np.arange(bins), source.tokens_by_bin, 0.86, below, color=color[source.name], label=source.name)
        below += source.tokens_by_bin
    axes.set_xlim(first - 0.6, bins - 0.4)
    axes.set_xticks(np.arange(first, bins + 1) - 0.5)
    shown = max(1, -(-(bins - first) // 10))
    labels = [format_length(1 << i) if (bins - i) % shown == 0 else "" for i in range(first, bins + 1)]
    axes.set_xticklabels(labels)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_amount(value)))
    axes.grid(False, axis="x")
    axes.set_title("what there is")
    axes.set_xlabel("document length (tokens)")
    axes.set_ylabel("tokens")


def _draw_mixes(
    axes: Axes,
    sources: Sequence[Holding],
    stages: Mapping[str, Sequence[SourceDraw]],
    color: Mapping[str, str],
    theme: Theme,
) -> None:
    total = sum(source.tokens for source in sources)
    bars: list[tuple[str, list[tuple[str, float]]]] = [
        ("natural", [(source.name, source.tokens / total) for source in sources])
    ]
    bars += [(name, [(draw.name, draw.share) for draw in draws]) for name, draws in stages.items()]
    for row, (_, parts) in enumerate(bars):
        left = 0.0
        for name, share in parts:
            axes.barh(row, share, 0.6, left, color=color[name])
            if share >= 0.08:
                axes.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center", color=theme.paper)
            left += share
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(False, axis="y")
    axes.set_title("what stages draw")
    axes.set_xlabel("share of the tokens")


def format_length(tokens: int) -> str:
    """``512``, ``8K``, ``1M``: powers of two in their own units."""
    for power, unit in ((20, "M"), (10, "K")):
        if tokens >= 1 << power:
            return f"{tokens / (1 << power):g}{unit}"
    return str(tokens)
