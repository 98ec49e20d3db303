"""Two machines over ssh: here two loopback addresses of an sshd that the tests start for themselves."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moba_train.config import Device, LaunchConfig, LaunchKind
from moba_train.metrics_file import read_rows
from moba_train.parallel import hosts, launch, local, ssh
from moba_train.parallel.hostfile import choose
from test_distributed import losses, wait_for, workers_of

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin:/sbin")
needs_sshd = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None, reason="no sshd or no ssh on this machine: install openssh"
)
HOSTS = ("127.0.0.1", "127.0.0.2")


def hostfile(folder: Path, text: str) -> str:
    file = folder / "hosts"
    file.write_text(text)
    return str(file)


FOUR = "# two machines\nnode-a slots=3\n\nnode-b slots=1  # the small one\n"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [("node-a", 3), ("node-b", 1)]),
        ({"processes": 2}, [("node-a", 2)]),
        ({"gpus": 4}, [("node-a", 3), ("node-b", 1)]),
        ({"gpus_per_node": 1}, [("node-a", 1), ("node-b", 1)]),
    ],
    ids=["all slots", "fewer than the first has", "as many as there are", "as many of each"],
)
def test_who_runs_what(tmp_path: Path, settings: dict[str, int], expected: list[tuple[str, int]]) -> None:
    config = LaunchConfig(kind=LaunchKind.hostfile, hostfile=hostfile(tmp_path, FOUR), **settings)
    assert [(host.name, host.processes) for host in choose(config)] == expected
    settled = launch.settle(config)
    assert settled.world_size == sum(count for _, count in expected)
    assert settled.nodes == len(expected) and settled.port
    assert choose(settled) == choose(config)


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        ("", {}, "names no machine"),
        ("node-a 8", {}, "line 1 is 'node-a 8': write HOST slots=N"),
        ("node-a slots=0", {}, "line 1"),
        ("-oProxyCommand=x slots=1", {}, "line 1"),
        ("node-a slots=1\nnode-a slots=2", {}, "line 2 names node-a again"),
        (FOUR, {"gpus": 5}, "launch.gpus=5 .* has 4 slots"),
        (FOUR, {"gpus_per_node": 2}, "launch.gpus_per_node=2 and node-b has slots=1"),
        (FOUR, {"nodes": 3, "gpus_per_node": 1}, "launch.nodes=3 .* names 2"),
    ],
)
def test_a_hostfile_that_cannot_be_used(tmp_path: Path, text: str, settings: dict[str, int], words: str) -> None:
    config = LaunchConfig(kind=LaunchKind.hostfile, hostfile=hostfile(tmp_path, text), **settings)
    with pytest.raises(ValueError, match=words) as caught:
        launch.settle(config)
    assert "\n" not in str(caught.value)
    config.hostfile = "/nope/hosts"
    with pytest.raises(ValueError, match="=/nope/hosts cannot be read"):
        launch.settle(config)


@pytest.fixture(scope="module")
def ssh_options(tmp_path_factory) -> Iterator[list[str]]:
    """Arguments with which ssh reaches an sshd on both addresses, at a port and with keys of its own."""
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    port = local.free_port()
    (folder / "sshd_config").write_text(
        "".join(f"ListenAddress {host}:{port}\n" for host in HOSTS)
        + f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        "StrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\nPermitRootLogin yes\nMaxStartups 30\n"
    )
    (folder / "config").write_text(
        f"Host *\n  Port {port}\n  User {getpass.getuser()}\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n"
        "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    assert SSHD is not None
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    try:
        wait_for(lambda: server.poll() is not None or not local.port_is_free(port), 10)
        assert server.poll() is None, (folder / "log").read_text()
        yield ["-F", str(folder / "config")]
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def two_hosts(tmp_path: Path, ssh_options: list[str]) -> LaunchConfig:
    text = "".join(f"{host} slots=1\n" for host in HOSTS)
    return launch.settle(
        LaunchConfig(
            kind=LaunchKind.hostfile,
            device=Device.cpu,
            hostfile=hostfile(tmp_path, text),
            ssh_options=ssh_options,
        )
    )


def interpreter(folder: Path, line: str) -> str:
    """A python with another environment, as another machine has."""
    file = folder / "python"
    file.write_text(f'#!/bin/sh\n{line}\nexec {sys.executable} "$@"\n')
    file.chmod(0o755)
    return str(file)


def refused(config: LaunchConfig, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        hosts.check(config)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@needs_sshd
def test_a_machine_that_does_not_let_in(two_hosts: LaunchConfig, tmp_path: Path) -> None:
    hosts.check(two_hosts)  # these do
    file, two_hosts.hostfile = two_hosts.hostfile, hostfile(tmp_path, f"{HOSTS[0]} slots=1\n127.0.0.3 slots=1\n")
    refused(two_hosts, "127.0.0.3 cannot be reached over ssh", "refused", "launch.ssh_options")
    two_hosts.hostfile = file
    config = Path(two_hosts.ssh_options[1])
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    (tmp_path / "config").write_text(config.read_text().replace(f"{config.parent}/user", f"{tmp_path}/other"))
    two_hosts.ssh_options = ["-F", str(tmp_path / "config")]
    refused(two_hosts, "cannot be reached over ssh", "Permission denied", "without a password")


@pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh on this machine")
def test_a_name_server_that_says_nothing(tmp_path: Path, monkeypatch) -> None:
    asked = []

    def silent(name: str, port: None) -> None:
        asked.append(name)
        time.sleep(5)

    monkeypatch.setattr(hosts, "_NAME_SECONDS", 0.2)
    monkeypatch.setattr(hosts.socket, "getaddrinfo", silent)
    (tmp_path / "config").write_text("Host short\n  HostName node-a.example\nHost behind\n  ProxyJump gate\n")
    config = LaunchConfig(kind=LaunchKind.hostfile, ssh_options=["-F", str(tmp_path / "config")])
    config.hostfile = hostfile(tmp_path, "short slots=1\n")
    refused(config, "told the address of node-a.example within 0.2 s", "short's address in launch.hostfile=")
    assert asked == ["node-a.example"]
    assert ssh.looked_up(config, "behind") is None and ssh.looked_up(config, "other") == "other"


@pytest.mark.skipif(shutil.which("ssh") is None, reason="no ssh on this machine")
def test_a_configuration_of_ssh_that_waits(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ssh, "_CONFIGURATION_SECONDS", 0.2)
    (tmp_path / "config").write_text('Match exec "sleep 5"\n  User other\n')
    config = LaunchConfig(kind=LaunchKind.hostfile, ssh_options=["-F", str(tmp_path / "config")])
    config.hostfile = hostfile(tmp_path, "node slots=1\n")
    refused(config, r"config node` did not end within 0.2 s: a Match exec line", "launch.ssh_options=[-F,FILE]")


@needs_sshd
def test_a_port_in_use(two_hosts: LaunchConfig) -> None:
    with socket.socket() as taken:
        taken.bind(("", two_hosts.port))
        taken.listen()
        refused(two_hosts, f"launch.port={two_hosts.port} is in use on {HOSTS[0]}")


@needs_sshd
def test_a_machine_with_other_versions(two_hosts: LaunchConfig, tmp_path: Path) -> None:
    torch = tmp_path / "torch-9.9.dist-info"
    torch.mkdir()
    (torch / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    two_hosts.python = interpreter(tmp_path, f"export PYTHONPATH={tmp_path}:$PYTHONPATH")
    refused(two_hosts, f"{HOSTS[0]} has torch 9.9 and this machine has", "launch.python")

    package = tmp_path / "old/moba_train"
    shutil.copytree(Path(launch.__file__).parents[1], package, ignore=shutil.ignore_patterns("*.pyc"))
    with (package / "train.py").open("a") as file:
        file.write("# another line\n")
    two_hosts.python = interpreter(tmp_path, f"cd {tmp_path} && export PYTHONPATH={tmp_path}/old")
    refused(two_hosts, f"{HOSTS[0]} has moba_train 0.1.0 (", "and this machine has 0.1.0 (")

    two_hosts.python = "/nope/python"
    refused(two_hosts, f"{HOSTS[0]} cannot run /nope/python", "launch.python")


@needs_sshd
def test_more_gpus_than_a_machine_has(two_hosts: LaunchConfig) -> None:
    two_hosts.device, two_hosts.gpus_per_node, two_hosts.nodes = Device.auto, 64, 1
    two_hosts.hostfile = hostfile(Path(two_hosts.hostfile or "").parent, f"{HOSTS[1]} slots=64\n")
    with pytest.raises(ValueError, match=rf"{HOSTS[1]} is to run 64 processes and has \d+ GPUs: .*launch.device=cpu"):
        hosts.check(two_hosts)


def over_ssh_of(config: LaunchConfig) -> list[str]:
    return ["launch=hostfile", f"launch.hostfile={config.hostfile}", f"launch.ssh_options={config.ssh_options}"]


def cli(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "moba_train", "train", *arguments]


@needs_sshd
@pytest.mark.distributed
def test_two_machines(tiny_overrides: list[str], two_hosts: LaunchConfig, tmp_path: Path) -> None:
    """The command that a user gives: the run equals one of two processes on one machine."""
    over_ssh = [
        "launch=hostfile",
        f"launch.hostfile={two_hosts.hostfile}",
        f"launch.ssh_options={two_hosts.ssh_options}",
    ]
    folder = tmp_path / "runs/ssh"
    done = subprocess.run(cli(*tiny_overrides, *over_ssh, "run.name=ssh"), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line.startswith("command: ssh ")]
    assert len(printed) == 2 and all(f" {host} 'cd " in line for host, line in zip(HOSTS, printed, strict=True))
    assert all("MASTER_ADDR=127.0.0.1 " in line and f"{folder}/resolved.yaml" in line for line in printed)
    assert "report: " in done.stdout
    assert json.loads((folder / "result.json").read_text())["status"] == "completed"
    assert not workers_of(folder)
    done = subprocess.run(
        cli(*tiny_overrides, "run.name=local", "launch.processes=2"), capture_output=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    assert losses(folder) == losses(tmp_path / "runs/local")


@needs_sshd
@pytest.mark.distributed
def test_all_machines_end_together(tiny_overrides: list[str], two_hosts: LaunchConfig, tmp_path: Path) -> None:
    """Told to stop, it saves; when a rank of one machine is killed, or the command itself, nothing is left on any."""
    folder = tmp_path / "runs/long"
    command = cli(
        *(value.replace("tokens: 2048", "tokens: 512000") for value in tiny_overrides),
        *over_ssh_of(two_hosts),
        *("run.name=long", "run.resume=auto"),
    )

    def rows() -> int:
        file = folder / "metrics.jsonl"
        return sum("train/loss" in row for row in read_rows(file)) if file.exists() else 0

    def rank(number: int) -> int:
        (found,) = [
            pid
            for pid in workers_of(folder)
            if f"\0RANK={number}\0" in Path(f"/proc/{pid}/environ").read_text()
            and "moba_train.worker" in Path(f"/proc/{pid}/cmdline").read_text()
        ]
        return found

    def begun() -> subprocess.Popen[str]:
        before = rows()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: process.poll() is not None or rows() not in (0, before), 90)
        assert process.poll() is None, process.communicate()
        return process

    try:
        process = begun()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=40) == 128 + signal.SIGTERM
        assert len(list((folder / "checkpoints").iterdir())) == 1
        assert not workers_of(folder)

        process = begun()
        os.kill(rank(1), signal.SIGKILL)
        _, error = process.communicate(timeout=15)
        assert process.returncode == 128 + signal.SIGKILL
        assert "rank 1 was ended by SIGKILL" in error
        assert not workers_of(folder)

        process = begun()
        process.kill()
        wait_for(lambda: not workers_of(folder), 15)
        assert process.wait() == -signal.SIGKILL
    finally:
        for pid in workers_of(folder):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


@needs_sshd
@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("pdsh") is None, reason="DeepSpeed's launcher needs pdsh, which this machine has not")
def test_deepspeeds_own_launcher(tiny_overrides: list[str], two_hosts: LaunchConfig, tmp_path: Path) -> None:
    """The same hostfile and the same settings, on a cluster where it has to be that launcher."""
    dry = cli(*tiny_overrides, "run.name=ds", "launch.processes=2", "launch.dry_run=true")
    subprocess.run(dry, check=True, capture_output=True)
    folder = tmp_path / "runs/ds"
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(two_hosts.hostfile)]
    command += ["--no_ssh_check", "--master_addr", HOSTS[0], "--master_port", str(two_hosts.port)]
    done = subprocess.run(
        [*command, "--module", "moba_train.worker", "--config", str(folder / "resolved.yaml")],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PDSH_SSH_ARGS_APPEND": " ".join(two_hosts.ssh_options)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((folder / "result.json").read_text())["status"] == "completed"
    assert len(list((folder / "checkpoints").glob("*/rank_*.json"))) == 2
