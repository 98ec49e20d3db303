"""What a rank does when it cannot go on: one line, an exit code, and nothing lost that was saved before.

They stand with the distributed ones for their time: most need a whole run and another.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moba_train import resolved
from moba_train.checkpoint import newest_whole
from moba_train.config import Config
from moba_train.metrics_file import read_rows
from moba_train.parallel import local
from tiny import run_worker

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def finished(tiny_config_module: Config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("worker") / "run"
    done = run_worker(tiny_config_module, folder)
    assert done.returncode == 0, done.stderr
    return folder


def error_lines(text: str) -> list[str]:
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_no_whole_checkpoint_ends_the_run(tiny_config: Config, tmp_path: Path) -> None:
    """Never a silent start from step 0."""
    folder = tmp_path / "run"
    for step in (2, 4):
        (folder / "checkpoints" / f"step_{step:08d}" / "engine").mkdir(parents=True)
        (folder / "checkpoints" / f"step_{step:08d}" / "manifest.json").write_text("{}")
    done = run_worker(tiny_config, folder)
    assert done.returncode == 2
    (line,) = error_lines(done.stderr)
    assert "none of the 2 checkpoints" in line and "another run.name" in line
    assert not (folder / "metrics.jsonl").exists()


def test_a_disk_that_fills_up_leaves_the_older_checkpoint(finished: Path, tiny_config: Config, tmp_path: Path) -> None:
    """Writes fail for real here, past a file size that metrics.jsonl does not reach and a checkpoint's files do."""
    folder = tmp_path / "run"
    shutil.copytree(finished / "checkpoints/step_00000002", folder / "checkpoints/step_00000002")
    shutil.copy(finished / "metrics.jsonl", folder)
    (folder / resolved.FILE).write_text(resolved.to_yaml(tiny_config))
    sizes = [file.stat().st_size for file in (folder / "checkpoints").rglob("*.pt")]
    limit = max(sizes) // 2
    assert (folder / "metrics.jsonl").stat().st_size < limit
    done = subprocess.run(
        local.command(folder / resolved.FILE),
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    (line,) = error_lines(done.stderr)
    assert "step_00000004 could not be written" in line and "run.resume=auto" in line
    assert newest_whole(folder / "checkpoints") == folder / "checkpoints/step_00000002"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000002"]
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row] == [1, 2, 3, 4]


def test_a_finished_run_that_goes_on_exports_the_same_model(
    finished: Path, tiny_config: Config, tmp_path: Path
) -> None:
    """A kill between the last checkpoint and the export: nothing is left to train, and all of it to write."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "model")
    (folder / "result.json").unlink()
    rows = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(b'12\nnull\n{"a": 1}\n\xff\x00\n' + rows)
    done = run_worker(tiny_config, folder)
    assert done.returncode == 0, done.stderr
    for name in ("config.json", "model.safetensors"):
        assert (folder / "model" / name).read_bytes() == (finished / "model" / name).read_bytes(), name
    points = [json.loads((run / "result.json").read_text())["points"] for run in (folder, finished)]
    assert points[0] == points[1]
    assert (folder / "metrics.jsonl").read_bytes() == rows, "what is no row is left out"


FAULTY = """
import errno, sys
import torch
from moba_train import train_step, worker
step_engine = train_step.step_engine
def planted(engine, settings):
    if engine.global_steps == 2:
        FAULT
    return step_engine(engine, settings)
train_step.step_engine = planted
sys.exit(worker.main())
"""


def run_faulty(fault: str, config: Config, folder: Path) -> subprocess.CompletedProcess[str]:
    """A run in which ``fault``, a statement, is executed before the third step."""
    folder.mkdir()
    (folder / resolved.FILE).write_text(resolved.to_yaml(config))
    return subprocess.run(
        [sys.executable, "-c", FAULTY.replace("FAULT", fault), "--config", str(folder / resolved.FILE)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_is_saved(tiny_config: Config, tmp_path: Path) -> None:
    tiny_config.checkpoint.every_steps = tiny_config.train.nonfinite_limit = 1
    folder = tmp_path / "run"
    done = run_faulty("next(engine.module.parameters()).grad.fill_(float('nan'))", tiny_config, folder)
    assert done.returncode == 3, done.stderr
    (line,) = error_lines(done.stderr)
    assert "step 3 was skipped" in line and "gradient norm nan" in line and "learning_rate.peak" in line
    newest = newest_whole(folder / "checkpoints")
    assert newest is not None and newest.name == "step_00000002"


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (
            "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 3.00 MiB free.')",
            4,
            ["Tried to allocate 2.00 GiB: lower train.micro_batch_tokens=512", "train.zero_stage=0"],
        ),
        (
            "raise OSError(errno.ENOSPC, 'No space left on device', '/run/metrics.jsonl')",
            1,
            ["/run/metrics.jsonl cannot be written (No space left on device)", "run.resume=auto"],
        ),
    ],
    ids=["GPU memory", "disk"],
)
def test_a_machine_that_is_too_small(
    tiny_config: Config, tmp_path: Path, fault: str, code: int, words: list[str]
) -> None:
    tiny_config.train.micro_batch_tokens = 512
    done = run_faulty(fault, tiny_config, tmp_path / "run")
    assert done.returncode == code, done.stderr
    (line,) = error_lines(done.stderr)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN], ids=["in front", "a shell's background job"])
def test_ctrl_c_while_everything_is_imported(tiny_config: Config, tmp_path: Path, handler: signal.Handlers) -> None:
    """It ends the process without a traceback, or is ignored as whoever started it ignores it."""
    (tmp_path / resolved.FILE).write_text(resolved.to_yaml(tiny_config))
    begun = subprocess.Popen(
        local.command(tmp_path / resolved.FILE),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )
    time.sleep(0.7)  # Python is up, and torch is not
    begun.send_signal(signal.SIGINT)
    if handler is signal.SIG_IGN:
        time.sleep(0.3)
        assert begun.poll() is None
        begun.kill()
    assert begun.communicate(timeout=60)[1] == ""
    assert begun.returncode == -(signal.SIGKILL if handler is signal.SIG_IGN else signal.SIGINT)
