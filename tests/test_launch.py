"""Starting the processes: what their command line is, and that a signal to the launcher ends them all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moba_train.config import LaunchConfig
from moba_train.parallel import launch

REST = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"
LAUNCHER = f"""
import sys
from pathlib import Path
from moba_train.config import LaunchConfig
from moba_train.parallel import launch
launch.command = lambda *_: [sys.executable, "-c", {REST!r}]
sys.exit(launch.run(LaunchConfig(), Path("resolved.yaml")))
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie whose parent has not read its exit code runs no more.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("processes", [1, 4])
def test_command(processes: int) -> None:
    command = launch.command(LaunchConfig(processes=processes), Path("/run/resolved.yaml"))
    assert command[0] == sys.executable
    assert command[-4:] == ["-m", "moba_train.worker", "--config", "/run/resolved.yaml"]
    assert ("torch.distributed.run" in command) is (processes > 1)
    assert (f"--nproc-per-node={processes}" in command) is (processes > 1)


def test_ports_of_concurrent_runs_differ() -> None:
    commands = [launch.command(LaunchConfig(processes=2), Path("r")) for _ in range(3)]
    ports = {part for command in commands for part in command if part.startswith("--master-port=")}
    assert len(ports) == 3
    assert "--master-port=29501" in launch.command(LaunchConfig(processes=2, port=29501), Path("r"))


@pytest.mark.parametrize(
    ("code", "expected"), [("sys.exit(0)", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)]
)
def test_exit_code(monkeypatch, code: str, expected: int) -> None:
    monkeypatch.setattr(launch, "command", lambda *_: [sys.executable, "-c", f"import os, sys; {code}"])
    handler = signal.getsignal(signal.SIGTERM)
    assert launch.run(LaunchConfig(), Path("resolved.yaml")) == expected
    assert signal.getsignal(signal.SIGTERM) is handler


def test_environment_of_the_processes(monkeypatch, tmp_path: Path) -> None:
    script = f"import json, os; json.dump(dict(os.environ), open({str(tmp_path / 'seen')!r}, 'w'))"
    monkeypatch.setattr(launch, "command", lambda *_: [sys.executable, "-c", script])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert launch.run(LaunchConfig(threads=3), Path("resolved.yaml")) == 0
    seen = json.loads((tmp_path / "seen").read_text())
    assert seen["OMP_NUM_THREADS"] == "3"
    assert seen["OMP_WAIT_POLICY"] == "ACTIVE"  # the user's own choice stands
    assert seen["TOKENIZERS_PARALLELISM"] == os.environ.get("TOKENIZERS_PARALLELISM", "false")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_to_the_launcher_ends_the_process(number: signal.Signals) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert launcher.stdout is not None
    child = int(launcher.stdout.readline())
    assert alive(child)
    time.sleep(0.2)  # the handlers are set right after the child is started
    launcher.send_signal(number)
    assert launcher.wait(timeout=20) == 128 + number
    assert not alive(child)
