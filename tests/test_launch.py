"""Starting the processes: what each is given, and that a failure of one or a signal to the launcher ends them all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moba_train.config import Device, LaunchConfig, LaunchKind
from moba_train.parallel import launch, lifetime, local, supervise, variables

REST = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"
LAUNCHER = f"""
import sys
from pathlib import Path
from moba_train.config import LaunchConfig
from moba_train.parallel import launch, local
local.command = lambda *_: [sys.executable, "-c", {REST!r}]
sys.exit(launch.run(LaunchConfig(), Path("resolved.yaml")))
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie whose parent has not read its exit code runs no more.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_each_process_has_its_rank() -> None:
    environments = local.environments(LaunchConfig(processes=3), Path("run"))
    assert [environment["RANK"] for environment in environments] == ["0", "1", "2"]
    assert [environment["LOCAL_RANK"] for environment in environments] == ["0", "1", "2"]
    assert {environment["WORLD_SIZE"] for environment in environments} == {"3"}
    assert len({environment["MASTER_PORT"] for environment in environments}) == 1


def test_ports_of_concurrent_runs_differ() -> None:
    ports = {local.environments(LaunchConfig(processes=2), Path("run"))[0]["MASTER_PORT"] for _ in range(3)}
    assert len(ports) == 3
    assert local.environments(LaunchConfig(processes=2, port=29501), Path("run"))[0]["MASTER_PORT"] == "29501"


@pytest.mark.parametrize(
    ("settings", "size"),
    [({}, 1), ({"processes": 3}, 3), ({"gpus": 8}, 8), ({"nodes": 4, "gpus_per_node": 8}, 32), ({"nodes": 4}, 4)],
    ids=str,
)
def test_how_many(settings: dict[str, int], size: int) -> None:
    config = LaunchConfig(**settings)
    assert config.world_size == size
    assert config.needs_gpus is any("gpus" in key for key in settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gpus": 8, "processes": 4}, r"launch\.processes=4 and launch\.gpus=8 differ"),
        ({"gpus": 8, "gpus_per_node": 4}, r"launch\.gpus=8 and launch\.nodes x launch\.gpus_per_node=4 differ"),
        ({"nodes": 2}, r"launch\.nodes=2 with launch=local: choose launch=hostfile or launch=slurm"),
        ({"hostfile": "hosts"}, r"launch\.hostfile=hosts with launch=local"),
        ({"kind": LaunchKind.slurm, "nodes": 0, "processes": 8}, r"launch\.nodes=0: must be at least 1"),
        ({"kind": LaunchKind.hostfile, "nodes": -1}, r"launch\.nodes=-1: must be at least 1"),
        ({"gpus": 0}, r"launch\.gpus=0: must be at least 1"),
        ({"gpus": 2, "device": Device.cpu}, r"launch\.gpus=2 with launch\.device=cpu: give launch\.processes=2"),
        ({"ssh_options": ["-v"]}, r"launch\.ssh_options=\['-v'\] with launch=local: choose launch=hostfile"),
        ({"python": "python3"}, r"launch\.python=python3 with launch=local"),
    ],
)
def test_numbers_that_contradict(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        launch.settle(LaunchConfig(**settings))


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"launch\.port={port} is in use on this machine"):
            launch.check(launch.settle(LaunchConfig(port=port)))
    launch.check(launch.settle(LaunchConfig()))


def test_a_dry_run_prints_what_a_run_does(monkeypatch, capfd, tmp_path: Path) -> None:
    """The printed line, pasted into a shell, starts the same ranks with the same environment."""
    names = "RANK LOCAL_RANK WORLD_SIZE MASTER_PORT OMP_NUM_THREADS NCCL_DEBUG TORCH_NCCL_ASYNC_ERROR_HANDLING A"
    script = f"import os; os.write(1, ' '.join(['rank', *map(os.environ.get, {names.split()})]).encode() + b'\\n')"
    monkeypatch.setattr(local, "command", lambda *_: [sys.executable, "-c", script])
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = LaunchConfig(processes=2, port=29501, threads=1, environment={"A": "it's"}, dry_run=True)
    assert launch.run(config, tmp_path / "resolved.yaml") == 0
    line = capfd.readouterr().out.strip()
    assert line.startswith("command: ") and "\n" not in line

    def ranks(text: str) -> list[str]:
        return sorted(line for line in text.splitlines() if line.startswith("rank "))

    pasted = subprocess.run(["bash", "-c", line.removeprefix("command: ")], capture_output=True, text=True)
    config.dry_run = False
    assert launch.run(config, tmp_path / "resolved.yaml") == 0
    assert ranks(pasted.stdout) == ranks(capfd.readouterr().out)
    assert ranks(pasted.stdout) == [f"rank {rank} {rank} 2 29501 1 INFO 3 it's" for rank in range(2)]


def test_the_allocator_is_the_users_own_under_either_name(monkeypatch, tmp_path: Path) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    expected = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert expected.items() <= variables.of_processes(LaunchConfig(gpus=1), tmp_path).items()
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        with monkeypatch.context() as users:
            users.setenv(name, "max_split_size_mb:512")
            assert "PYTORCH_ALLOC_CONF" not in variables.of_processes(LaunchConfig(gpus=1), tmp_path)
    users_own = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}
    given = variables.of_processes(LaunchConfig(gpus=1, environment=users_own), tmp_path)
    assert users_own.items() <= given.items() and "PYTORCH_ALLOC_CONF" not in given


@pytest.mark.parametrize(
    ("code", "expected"), [("sys.exit(0)", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)]
)
def test_exit_code(monkeypatch, code: str, expected: int) -> None:
    monkeypatch.setattr(local, "command", lambda *_: [sys.executable, "-c", f"import os, sys; {code}"])
    handler = signal.getsignal(signal.SIGTERM)
    assert launch.run(LaunchConfig(), Path("resolved.yaml")) == expected
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("sys.exit(3) if rank == 1 else time.sleep(60)", 3),
        ("sys.exit(rank)", 1),
        ("sys.exit(5) if rank == 0 else (signal.signal(signal.SIGHUP, signal.SIG_IGN), time.sleep(60))", 5),
        ("None", 0),
    ],
    ids=["one fails", "the lowest rank's code", "one does not heed SIGHUP", "none fails"],
)
def test_one_that_fails_ends_the_others(monkeypatch, body: str, expected: int) -> None:
    code = f"import os, signal, sys, time; rank = int(os.environ['RANK']); {body}"
    monkeypatch.setattr(local, "command", lambda *_: [sys.executable, "-c", code])
    monkeypatch.setattr(supervise, "_KILL_SECONDS", 0.5)
    began = time.monotonic()
    assert launch.run(LaunchConfig(processes=2), Path("resolved.yaml")) == expected
    assert time.monotonic() - began < 20


def test_environment_of_the_processes(monkeypatch, tmp_path: Path) -> None:
    script = f"import json, os; json.dump(dict(os.environ), open({str(tmp_path / 'seen')!r}, 'w'))"
    monkeypatch.setattr(local, "command", lambda *_: [sys.executable, "-c", script])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert launch.run(LaunchConfig(threads=3), Path("resolved.yaml")) == 0
    seen = json.loads((tmp_path / "seen").read_text())
    assert seen["OMP_NUM_THREADS"] == "3"
    assert seen["OMP_WAIT_POLICY"] == "ACTIVE"  # the user's own choice stands
    assert seen["TOKENIZERS_PARALLELISM"] == os.environ.get("TOKENIZERS_PARALLELISM", "false")


def test_the_processes_share_a_claim(monkeypatch, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from moba_train.parallel import lifetime
folder = Path({str(tmp_path)!r})
held = lifetime.inherit_or_claim(folder)
try:
    lifetime.claim(folder)
except ValueError:
    raise SystemExit(9)
"""
    monkeypatch.setattr(local, "command", lambda *_: [sys.executable, "-c", code])
    with lifetime.claim(tmp_path) as claim:
        assert launch.run(LaunchConfig(processes=2), Path("resolved.yaml"), claim) == 9
        with pytest.raises(ValueError, match="another process"):
            lifetime.claim(tmp_path)
    lifetime.claim(tmp_path).close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_to_the_launcher_ends_the_process(number: signal.Signals) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline().startswith("command: ")
    child = int(launcher.stdout.readline())
    assert alive(child)
    launcher.send_signal(number)
    assert launcher.wait(timeout=20) == 128 + number
    assert not alive(child)


def test_what_a_signal_did_before_it_does_once_the_processes_have_ended() -> None:
    """As submitit's queueing again, which ends this process and with it those that are still saving."""
    seen: list[tuple[int, int | None]] = []
    script = "trap 'sleep 0.3; exit 140' USR2; kill -USR2 $PPID; while :; do sleep 0.05; done"
    rank: list[supervise.Process] = []

    def start() -> supervise.Process:
        rank.append(supervise.Process("rank 0", ["bash", "-c", script], os.environ))
        return rank[0]

    previous = signal.signal(signal.SIGUSR2, lambda number, _frame: seen.append((number, rank[0].poll())))
    try:
        assert supervise.run([start]) == 140
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert seen == [(signal.SIGUSR2, 140)]
