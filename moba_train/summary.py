"""A finished run as a table on the console."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moba_train import result_file


def print_summary(folder: Path, console: Console) -> None:
    """Held-out losses at each point of the run, from its result.json."""
    result = result_file.read(folder)
    title = f"{folder.name}: held-out loss (nats a token)"
    console.print(title, style="italic", soft_wrap=True, markup=False)  # a name's brackets are not markup
    table = Table()
    for column, justify in (("point", "left"), ("step", "right"), ("tokens", "right"), ("loss", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("trailing loss", justify="right")
    for point in result["points"]:
        table.add_row(
            Text(point["point"]),
            str(point["step"]),
            f"{point['tokens']:,}",
            f"{point['loss']:.3f}",
            f"{point['trailing_loss']:.3f}",
        )
    console.print(table)
    rate = result["tokens_per_second"]
    if rate:
        console.print(f"{result['tokens']:,} tokens in {result['seconds']:.0f} s, {rate:,.0f} tokens/s while training")
