"""A measurement in words: the table, what was checked, and the steps. Works from the JSON file's content alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moba_train.report.page import ABSENT

_LEAST_MS = 0.005  # of a step that is worth a line


def heading(result: Mapping[str, Any]) -> Iterator[str]:
    """Where and how it was measured."""
    yield ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    if result["ceilings"]:
        flops, size = result["ceilings"]["flops_per_ms"], result["ceilings"]["bytes_per_ms"]
        yield f"ceilings measured: matrix product {flops / 1e9:.0f} TFLOP/s, copy {size / 1e9:.2f} TB/s"


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A Markdown table, a row a case. Times are milliseconds of forward / forward + backward."""
    names = list(dict.fromkeys(name for row in rows for name in row["columns"] if name != "dense"))
    aimed, limited = (any(row.get(key) for row in rows) for key in ("aims", "limits_ms"))
    remembered = any(column["memory"] is not None for row in rows for column in row["columns"].values())
    head = ["case", "batch x tokens", "heads / kv", "block, top-k", "sparsity", "dense ms"]
    for name in names:
        head += [f"{name} ms", "ratio", *(["extra memory"] if remembered else [])]
    head += [*(["limit ms"] if limited else []), *(["aims"] if aimed else [])]
    yield _cells(head)
    yield _cells(["---"] * len(head))
    for row in rows:
        cells = [row["name"], f"{row['sequences']} x {row['length']:,}", f"{row['heads']} / {row['kv_heads']}"]
        cells += [
            f"{row['block_size']}, {row['top_k']}",
            f"{row['sparsity']:.1%}",
            _pair(_times(row, "dense"), "{:.4g}"),
        ]
        for name in names:
            cells += [_pair(_times(row, name), "{:.4g}"), _pair(ratios(row, name), "{:.3g}x")]
            if remembered:
                memory = row["columns"].get(name, {}).get("memory")
                cells.append(ABSENT if memory is None else f"{memory:.2f}")
        cells += [_pair(row.get("limits_ms"), "{:.3g}")] if limited else []
        cells += [", then ".join(_pair(aim, "{:g}x") for aim in row["aims"] or ()) or ABSENT] if aimed else []
        yield _cells(cells)


def details(row: Mapping[str, Any]) -> Iterator[str]:
    """How each implementation was checked, or why it has no times; then the steps."""
    yield f"{row['name']}: {row['sequences']} x {row['length']:,} tokens, dense by {row['dense_kernel']}"
    for name, column in row["columns"].items():
        yield f"  {name}: " + (f"checked: {column['checked']}" if column["checked"] else column["reason"])
    if "steps" not in row:
        return
    yield f"  {'step':<24} {'ms':>9} {'TFLOP':>9} {'GB':>8} {'limit ms':>9} {'of limit':>8}"
    for step in [*row["steps"], _backward(row["steps"])]:
        if step["ms"] >= _LEAST_MS or step["limit_ms"] >= _LEAST_MS:
            share = f"{step['limit_ms'] / step['ms']:8.0%}" if step["ms"] and step["limit_ms"] else f"{ABSENT:>8}"
            yield (
                f"  {step['step']:<24} {step['ms']:9.3f} {step['flops'] / 1e12:9.3f} {step['bytes'] / 1e9:8.3f} "
                f"{step['limit_ms']:9.3f} {share}"
            )


def _backward(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The steps of the backward pass together."""
    parts = [row for row in rows if row["step"].startswith("backward: ")]
    return {"step": "backward, together", **{k: sum(r[k] for r in parts) for k in ("ms", "flops", "bytes", "limit_ms")}}


def ratios(row: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """How many times faster than dense: forward, and forward + backward."""
    ours, theirs = _times(row, name), _times(row, "dense")
    return None if ours is None or theirs is None else (theirs[0] / ours[0], theirs[1] / ours[1])


def _times(row: Mapping[str, Any], name: str) -> Sequence[float] | None:
    column = row["columns"].get(name)
    return column["times"] if column and column["checked"] else None


def _pair(values: Sequence[float] | None, shown: str) -> str:
    return ABSENT if values is None else " / ".join(shown.format(value) for value in values)


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
