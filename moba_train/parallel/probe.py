"""What a machine has to run a rank with, as one line of JSON: python -m moba_train.parallel.probe"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import moba_train
from moba_train.parallel import local


def versions() -> dict[str, str]:
    """What must be the same on all machines of a run. The package by its content too: a checkout keeps its number."""
    code = hashlib.sha256()
    folder = Path(moba_train.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        code.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return {
        "Python": ".".join(map(str, sys.version_info[:2])),
        "moba_train": f"{moba_train.__version__} ({code.hexdigest()[:8]})",
        **{name: _version(name) for name in ("torch", "deepspeed", "transformers")},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, help="of the rendezvous: is it free?")
    parser.add_argument("--gpus", action="store_true", help="count them, which imports torch")
    arguments = parser.parse_args()
    gpus = 0
    if arguments.gpus:
        import torch

        gpus = torch.cuda.device_count()
    free = arguments.port is None or local.port_is_free(arguments.port)
    print(json.dumps({"versions": versions(), "gpus": gpus, "port_is_free": free}))


if __name__ == "__main__":
    main()
