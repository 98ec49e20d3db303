"""The smallest model that has everything (layers, groups of query heads, RoPE), and how tests run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import forks
from moba_train import resolved
from moba_train.config import Config, Device, LaunchConfig
from moba_train.parallel import local

TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


LAUNCHER = """
import sys
from pathlib import Path
from moba_train import resolved
from moba_train.parallel import launch
file = Path(sys.argv[1])
sys.exit(launch.run(resolved.load(file).launch, file))
"""


def launch_command(folder: Path) -> list[str]:
    """The launcher in a process of its own, as the command line is."""
    return [sys.executable, "-c", LAUNCHER, str(folder / resolved.FILE)]


def run_worker(config: Config, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a configuration in ``folder`` to its end."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / resolved.FILE).write_text(resolved.to_yaml(config))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(launch_command(folder), capture_output=True, text=True, env=environment, timeout=300)


def run_forked(config: Config, folder: Path) -> subprocess.CompletedProcess[str]:
    """``run_worker`` without the launcher, and in a fraction of the time: its ranks find everything imported."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / resolved.FILE).write_text(resolved.to_yaml(config))
    environments = local.environments(config.launch, folder)
    return forks.run("moba_train.worker", ["--config", str(folder / resolved.FILE)], environments)


def checkpoint_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's engine files, parameters and optimizer state, by its place in them."""
    tensors: dict[str, torch.Tensor] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}/{key}")
        elif isinstance(value, list | tuple):
            for index, inner in enumerate(value):
                walk(inner, f"{name}/{index}")

    for file in sorted((path / "engine").iterdir()):
        walk(torch.load(file, weights_only=False), file.name)  # our own files, just written
    return tensors


def run_ranks(script: Path, arguments: list[str], ranks: int = 1) -> str:
    """Run a script as every rank of a group on this machine; none may fail. Returns what they print."""
    launch = LaunchConfig(processes=ranks, device=Device.cpu, threads=1)
    done = forks.run(str(script), arguments, local.environments(launch, script.parent))
    assert done.returncode == 0, done.stderr
    return done.stdout
