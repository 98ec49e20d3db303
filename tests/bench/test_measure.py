"""Whole measurements on a CPU, at small sizes: `moba-train bench` as it is called."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moba_train import cli
from moba_train.attention import BACKENDS
from moba_train.bench import timing
from moba_train.bench.cases import CASES, Case
from moba_train.bench.measure import measure
from moba_train.commands.bench import BenchArguments, chosen_backends, chosen_cases

CPU = torch.device("cpu")
SMALL = ["tokens=[200,320]", "heads=4", "kv_heads=2", "head_dim=16", "block_size=32", "top_k=3", "device=cpu"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", {"cpu": 0.02})


def bench(folder: Path, *arguments: str) -> tuple[int, dict]:
    code = cli.run(["bench", *SMALL, *arguments, f"output={folder}"])
    return code, json.loads((folder / "bench.json").read_text())


def test_a_run_checks_times_prints_and_writes(tmp_path: Path, capsys) -> None:
    code, result = bench(tmp_path, "backends=[varlen,reference,triton,flash_moba,moonshot]", "sequences=2")
    assert code == 0
    assert [row["length"] for row in result["cases"]] == [200, 320]
    for row in result["cases"]:
        columns = row["columns"]
        assert list(columns) == ["dense", "varlen", "reference", "triton", "flash_moba", "moonshot"]
        for name in ("dense", "varlen", "reference"):
            assert columns[name]["checked"] and all(time > 0 for time in columns[name]["times"]), name
        for name, words in {
            "triton": "CUDA device",
            "flash_moba": "not installed",
            "moonshot": "not installed",
        }.items():
            assert words in columns[name]["reason"] and columns[name]["times"] is None
    assert result["machine"]["command"].startswith("moba-train bench 'tokens=[200,320]' heads=4")
    out = capsys.readouterr().out
    assert "| 200 | 2 x 200 | 4 / 2 | 32, 3 |" in out and "flash_moba: the flash_moba package is not installed" in out
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_backend_gets_no_speed_and_an_exit_code(tmp_path: Path, monkeypatch, capsys) -> None:
    """Under another package's name: it hands back values in the place of attention."""

    def wrong(query, key, value, *_rest):
        return value.repeat_interleave(query.shape[1] // key.shape[1], dim=1) + 0 * query + 0 * key.sum()

    broken = replace(BACKENDS["moonshot"], function=wrong, refuses=lambda *_: None)
    monkeypatch.setitem(BACKENDS, "moonshot", broken)
    code, result = bench(tmp_path, "backends=[varlen,moonshot]")
    assert code == 1
    for row in result["cases"]:
        column = row["columns"]["moonshot"]
        assert column["failed"] and column["times"] is None and "out differs in" in column["reason"]
        assert row["columns"]["varlen"]["times"]
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "error: check failed: 200 moonshot, 320 moonshot"
    assert "failed its check" in captured.out


def test_where_ours_is_wrong_nothing_is_held_against_it(monkeypatch) -> None:
    def wrong(*arguments):
        return BACKENDS["reference"].function(*arguments) * 1.1

    monkeypatch.setitem(BACKENDS, "varlen", replace(BACKENDS["varlen"], function=wrong))
    row = measure(Case("small", 1, 200, 4, 2, 32, 3, 16, "fp32"), ["varlen", "reference"], CPU, None)
    assert row["columns"]["varlen"]["failed"] and "out is off by" in row["columns"]["varlen"]["reason"]
    assert "nothing right to hold it against" in row["columns"]["reference"]["reason"]
    assert row["columns"]["varlen"]["times"] is row["columns"]["reference"]["times"] is None
    assert row["columns"]["dense"]["times"]


def test_a_package_that_breaks_is_named_and_the_rest_goes_on(monkeypatch) -> None:
    def breaks(*_arguments):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setitem(
        BACKENDS, "flash_moba", replace(BACKENDS["flash_moba"], function=breaks, refuses=lambda *_: None)
    )
    row = measure(Case("small", 1, 200, 4, 2, 32, 3, 16, "fp32"), ["flash_moba", "varlen"], CPU, None)
    column = row["columns"]["flash_moba"]
    assert column["reason"] == "RuntimeError: no kernel image is available" and not column["failed"]
    assert row["columns"]["varlen"]["times"]


def test_what_is_measured_where_nothing_is_named() -> None:
    cuda = torch.device("cuda")
    assert [case.length for case in chosen_cases(BenchArguments(), CPU)] == [2048, 4096, 8192, 16384, 32768]
    assert chosen_cases(BenchArguments(), cuda) == list(CASES.values())
    assert chosen_backends(BenchArguments(), CPU) == ["varlen"] and chosen_backends(BenchArguments(), cuda) == [
        "triton"
    ]
    own = chosen_cases(BenchArguments(cases=["c64k"], tokens=[4096], top_k=5), cuda)
    assert [case.name for case in own] == ["c64k", "4,096"] and (own[1].top_k, own[1].heads) == (5, 32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cases=c3k"], ["cases=c3k", "c32k, c64k"]),
        (["backends=[fast]"], ["backends=fast", "triton, varlen"]),
        (["cases=c32k", "block_size=64"], ["block_size without tokens", "tokens="]),
        (["cases=[c64k]", "tokens=64"], ["cases=c64k on a CPU", "GPU", "tokens="]),
        (["tokens=4096", "heads=5"], ["heads=5", "kv_heads=2"]),
        (["tokens=4096", "dtype=fp8"], ["dtype=fp8", "bf16, fp16, fp32"]),
        (["tokens=1"], ["tokens=1", "at least 2"]),
        (["tokens=4096", "top_k=0"], ["top_k=0", "at least 1"]),
        (["tokens=many"], ["many", "Integer"]),
        (["device=tpu"], ["tpu", "cpu, cuda"]),
        (["device=cuda"], ["device=cuda", "no GPU"]),
        (["blok_size=64"], ["blok_size is unknown", "block_size"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_refusals(arguments: list[str], words: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.run(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words), error
    assert not list(tmp_path.iterdir())
