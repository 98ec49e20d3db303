"""The report's page: HTML from tables and pictures, self-contained, readable on light and dark backgrounds."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

ABSENT = "\N{EN DASH}"  # stands where a run has no number

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --back: #f6f7f9; --ink: #1f2328; --faint: #5b6370;
  --line: #dfe3e8; --accent: #0072b2; --warn: #9a4b00; --warn-back: #fff3e0; }
@media (prefers-color-scheme: dark) { :root { --paper: #161b22; --back: #0d1117; --ink: #e6edf3; --faint: #9aa4af;
  --line: #2d333b; --accent: #56b4e9; --warn: #f0c042; --warn-back: #332701; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .35rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; }
p { margin: .4rem 0; } .lead { color: var(--faint); max-width: 46rem; }
.badge { display: inline-block; font-size: .8rem; font-weight: 600; padding: .1rem .6rem; border-radius: 1rem;
  vertical-align: .3rem; margin-left: .5rem; background: var(--back); color: var(--faint);
  border: 1px solid var(--line); }
.badge.warn { color: var(--warn); background: var(--warn-back); border-color: transparent; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.6rem, 1fr)); gap: .75rem;
  margin: 1.6rem 0 0; }
.tiles div { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; }
.tiles dt { color: var(--faint); font-size: .82rem; }
.tiles dd { margin: 0; font-size: 1.45rem; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.3; }
.tiles small { display: block; color: var(--faint); font-size: .8rem; font-weight: 400; }
dl { margin: 0; }
figure, .table { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; margin: 0;
  padding: 1rem; }
figure + .table { margin-top: .75rem; }
.table { overflow-x: auto; padding: .35rem 1rem; }
img { display: block; width: 100%; height: auto; }
figcaption, .note { color: var(--faint); font-size: .87rem; line-height: 1.5; margin: .7rem 0 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .5rem .75rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { padding-left: 0; } th:last-child, td:last-child { padding-right: 0; }
tr:last-child td { border-bottom: 0; } th { color: var(--faint); font-weight: 600; font-size: .82rem; }
td { overflow-wrap: anywhere; } td:first-child { min-width: 11rem; }
.number { text-align: right; white-space: nowrap; } .best { font-weight: 700; color: var(--accent); }
code, pre { font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { overflow-x: auto; margin: .8rem 0 0; } summary { cursor: pointer; }
details { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: .75rem 1rem; }
"""


@dataclass(frozen=True)
class Picture:
    """A figure's two renderings and what is written below it."""

    stem: str  # file name without its ending
    light: bytes  # PNG
    dark: bytes
    alt: str
    caption: str


@dataclass(frozen=True)
class Cell:
    """One table cell of plain text."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Columns named with a leading ``#`` hold numbers and are set to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    note: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    body: Sequence[Picture | Table]


@dataclass(frozen=True)
class Tile:
    """One figure at the top of the page."""

    name: str
    value: str
    detail: str = ""


def html(title: str, status: str, lead: str, tiles: Sequence[Tile], sections: Sequence[Section], settings: str) -> str:
    """The whole page. Every argument is plain text and is escaped here.

    Args:
        status: of the run, shown beside the title; empty for none, ``unfinished`` and ``failed`` stand out
        settings: the configuration as YAML, folded away at the end; empty for none
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)} · MoBA training report</title><style>{_STYLE}</style></head><body><main>",
        f"<header><h1>{escape(title)}{_badge(status)}</h1><p class=lead>{escape(lead)}</p></header>",
    ]
    if tiles:
        parts.append(f"<dl class=tiles>{''.join(map(_tile, tiles))}</dl>")
    for section in sections:
        parts.append(f"<section><h2>{escape(section.title)}</h2>")
        parts += [_picture(part) if isinstance(part, Picture) else _table(part) for part in section.body]
        parts.append("</section>")
    if settings:
        parts.append("<section><h2>Settings</h2><details><summary>resolved.yaml</summary>")
        parts.append(f"<pre>{escape(settings)}</pre></details></section>")
    return "\n".join([*parts, "</main></body></html>", ""])


def _badge(status: str) -> str:
    if not status:
        return ""
    kind = "badge warn" if status in ("unfinished", "failed") else "badge"
    return f'<span class="{kind}">{escape(status)}</span>'


def _tile(tile: Tile) -> str:
    detail = f"<small>{escape(tile.detail)}</small>" if tile.detail else ""
    return f"<div><dt>{escape(tile.name)}</dt><dd>{escape(tile.value)}{detail}</dd></div>"


def _picture(picture: Picture) -> str:
    light, dark = (
        "data:image/png;base64," + base64.b64encode(png).decode("ascii") for png in (picture.light, picture.dark)
    )
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(picture.alt)}"></picture>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    numeric = [name.startswith("#") for name in table.columns]
    head = "".join(
        f"<th{' class=number' if number else ''}>{escape(name.lstrip('#'))}</th>"
        for name, number in zip(table.columns, numeric, strict=True)
    )
    body = "".join("<tr>" + "".join(map(_cell, row, numeric)) + "</tr>" for row in table.rows)
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    return f"<div class=table><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}"


def _cell(cell: str | Cell, number: bool) -> str:
    cell = cell if isinstance(cell, Cell) else Cell(cell)
    kinds = [kind for kind, on in (("number", number), ("best", cell.best)) if on]
    return f'<td class="{" ".join(kinds)}">{escape(cell.text)}</td>'


def loss_text(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4f}"


def rate_text(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.0f}"


def share_text(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2%}"
