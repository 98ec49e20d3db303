"""The training benchmark runs whole, on a small model."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.distributed
def test_it_measures_steps_gradients_and_layers(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/bench_train.py"), "tiny", "tiny_gradients", "tiny_shared"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "rows.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "rows.json").read_text())
    rows = report["rows"]
    assert [(row["case"], row["attention"]["kind"]) for row in rows] == [
        ("tiny", "full"),
        ("tiny", "moba"),
        ("tiny_gradients", "moba"),
        ("tiny_gradients", "full"),
        ("tiny_shared", "moba"),
    ]
    assert all(row["tokens_per_second"] == pytest.approx(1024 / row["step_seconds"]) for row in rows)
    steps = [row for row in rows if "loss" in row]
    assert all(5 < row["loss"] < 8 and row["gradient_norm"] > 0 for row in steps)  # ln 500 = 6.2
    assert "estimated_from_layer_seconds" in rows[3] and "tiny     dense" in done.stdout
    alone, shared = rows[2], rows[4]  # the same row of the same model, and over two processes
    assert (alone["gpus"], shared["gpus"]) == (1, 2)
    for fact in ("loss", "gradient_norm"):
        assert shared[fact] == pytest.approx(alone[fact], rel=1e-4)


def test_an_unknown_case_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/bench_train.py"), "33k"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: unknown case 33k: choose from tiny, ")


def test_every_kernel_of_attention_is_counted_as_attention() -> None:
    groups = runpy.run_path(str(ROOT / "scripts/bench_train_profile.py"))["GROUPS"]
    files = (ROOT / "moba_train/attention/kernels").rglob("*.py")
    kernels = {name for file in files for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)}
    assert len(kernels) > 20
    of_kernels = {
        next(group for group, names in groups.items() if any(n in kernel for n in names)) for kernel in kernels
    }
    assert of_kernels == {"attention"}
