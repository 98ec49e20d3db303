"""The printed table and the picture, from recorded measurements."""

from __future__ import annotations

import json

import pytest

from bench.recorded import growth, measurement
from moba_train.bench.figure import picture
from moba_train.bench.measure import Column
from moba_train.bench.table import details, heading, table


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def recorded() -> dict:
    return json.loads(json.dumps(measurement()))  # as it comes from the file


def test_the_table_has_a_column_an_implementation_and_no_speed_without_a_check() -> None:
    head, _, c32k, c64k = map(cells, table(recorded()["cases"]))
    by_name = dict(zip(head, c32k, strict=True))
    assert by_name["dense ms"] == "14.7 / 56" and by_name["triton ms"] == "3.02 / 8.96"
    assert by_name["moonshot ms"] == by_name["flash_moba ms"] == "–"  # noqa: RUF001
    assert by_name["aims"] == "4x / 6x, then 8x / 9x" and by_name["sparsity"] == "95.3%"
    assert c32k[head.index("triton ms") + 1] == "4.87x / 6.25x" and "0.42" in c32k
    assert c64k[:4] == ["c64k", "2 x 65,536", "16 / 16", "128, 8"]


def test_times_and_sizes_of_a_row_that_was_not_checked_are_not_shown() -> None:
    rows = recorded()["cases"]
    rows[0]["columns"]["triton"]["checked"] = ""
    assert "3.02" not in "\n".join(table(rows))
    with pytest.raises(AssertionError, match="not checked"):
        Column("triton", times=(1.0, 2.0))


def test_everything_that_is_printed() -> None:
    result = recorded()
    text = "\n".join([*heading(result), *(line for row in result["cases"] for line in details(row))])
    for words in (
        "command moba-train bench, gpu NVIDIA H200",
        "matrix product 787 TFLOP/s, copy 4.27 TB/s",
        "moonshot: failed its check: out differs in 40.0% of the rows",
        "flash_moba: the flash_moba package is not installed",
        "triton: checked: gate",
        "c64k: 2 x 65,536 tokens, dense by cuDNN",
    ):
        assert words in text, words
    steps = {line[:26].strip(): line.split() for line in text.splitlines()}
    for step in ("pool", "select", "route", "forward", "local + merge", "backward, together", "other"):
        assert step in steps, step
    assert "-" not in steps["forward"][-1] and steps["forward"][-1].endswith("%")
    assert steps["backward, together"][2] == "30.000"  # of the recorded 6, 7, 8 and 9


def test_on_a_cpu_there_are_neither_limits_nor_aims() -> None:
    head = cells(next(table(growth()["cases"])))
    assert head[-2:] == ["varlen ms", "ratio"]
    assert not any("limit" in line for row in growth()["cases"] for line in details(row))
    assert len(list(heading(growth()))) == 1


@pytest.mark.parametrize("made", [measurement, growth], ids=["ratios", "growth"])
def test_the_picture_is_drawn_from_the_file(made) -> None:
    png = picture(json.loads(json.dumps(made())))
    assert png is not None and png.startswith(b"\x89PNG") and len(png) > 10_000


def test_no_picture_of_nothing() -> None:
    result = recorded()
    for row in result["cases"]:
        row["columns"]["triton"] |= {"checked": "", "times": None}
    assert picture(result) is None
