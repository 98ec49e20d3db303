"""Time attention against dense attention and other MoBA packages: moba-train bench [key=value ...]

moba-train bench                                      on a GPU from 32K to 1M tokens, on a CPU the growth to 32K
moba-train bench cases=[c32k,c64k] backends=[triton,flash_moba,moonshot]
moba-train bench tokens=[8192,65536] heads=32 kv_heads=8 head_dim=64 block_size=256 top_k=4

cases       on a GPU: c32k, c64k, c128k, c512k, c1m, sequences of that many tokens, see moba_train/bench/cases.py
tokens      lengths of one's own, with sequences (1), heads, kv_heads, head_dim, block_size, top_k and dtype (bf16,
            fp16, fp32)
backends    triton (the default on a GPU), varlen (the default on a CPU), reference, and the packages flash_moba and
            moonshot where they are installed
device      auto, cpu or cuda
output      folder for bench.json and bench.png; runs/bench-<time> where it is not given

Nothing is timed whose outputs and gradients were not found right in the same run, dense attention included. The exit
code is 1 where a check failed. A backend that refuses a case, or is not installed, is named with its reason.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moba_train import durable
from moba_train.commands.arguments import parse
from moba_train.config import Device

if TYPE_CHECKING:
    import torch

    from moba_train.bench.cases import Case

USAGE = "bench [cases=[NAME,…]] [backends=[NAME,…]] [output=DIRECTORY]"
_LISTS = ("cases", "tokens", "backends")


@dataclass
class BenchArguments:
    cases: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    sequences: int = 1
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    block_size: int | None = None
    top_k: int | None = None
    dtype: str | None = None
    backends: list[str] = field(default_factory=list)
    device: Device = Device.auto
    output: str | None = None


def main(arguments: list[str]) -> int:
    given = parse(BenchArguments, [_listed(argument) for argument in arguments], USAGE)
    # torch takes seconds to import: a mistyped argument is told before.
    import torch

    from moba_train.bench.measure import DeviceLost, measure
    from moba_train.bench.table import details, heading, table
    from moba_train.bench.timing import ceilings

    device = _device(given)
    cases, backends = chosen_cases(given, device), chosen_backends(given, device)
    folder = Path(given.output or f"runs/bench-{datetime.now():%Y%m%d-%H%M%S}").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": machine(device, arguments), "ceilings": None, "cases": []}
    rates = None
    if device.type == "cuda":
        rates = ceilings(device)
        result["ceilings"] = asdict(rates)
        torch.cuda.empty_cache()
    _print(heading(result))
    lost = ""
    for case in cases:
        try:
            row = measure(case, backends, device, rates)
        except DeviceLost as error:
            lost = f"{error}: leave it out; what was measured before {case.name} stands"
            break
        result["cases"].append(row)
        durable.write(folder / "bench.json", json.dumps(result, indent=1) + "\n")
        _print(details(row))
    _print(table(result["cases"]))
    _draw(result, folder)
    print(f"written: {folder / 'bench.json'}")
    failed = [
        f"{row['name']} {name}"
        for row in result["cases"]
        for name, column in row["columns"].items()
        if column["failed"]
    ]
    for problem in [lost] if lost else [f"check failed: {', '.join(failed)}"] if failed else []:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if lost or failed else 0


def _listed(argument: str) -> str:
    """``cases=c32k`` is a list of one."""
    key, equals, value = argument.partition("=")
    return f"{key}=[{value}]" if equals and key in _LISTS and not value.startswith("[") else argument


def _device(given: BenchArguments) -> torch.device:
    import torch

    present = torch.cuda.is_available()
    if given.device is Device.cuda and not present:
        raise ValueError("device=cuda: torch sees no GPU; set device=cpu")
    return torch.device("cuda" if present and given.device is not Device.cpu else "cpu")


def chosen_cases(given: BenchArguments, device: torch.device) -> list[Case]:
    """
    Raises:
        ValueError: an unknown name, one of these cases without a GPU, a size that cannot be used, or sizes without
            ``tokens``.
    """
    from moba_train.bench.cases import CASES, CPU_LENGTHS, CPU_SIZES, CUDA_SIZES, Case

    for name in given.cases:
        if name not in CASES:
            raise ValueError(f"cases={name} is unknown: choose from {', '.join(CASES)}, or give tokens")
    sizes = dict(CUDA_SIZES if device.type == "cuda" else CPU_SIZES)
    own = {name: value for name in sizes if (value := getattr(given, name)) is not None}
    lengths = list(given.tokens)
    if not given.cases and not lengths and device.type == "cpu":
        lengths = list(CPU_LENGTHS)
    if not lengths and (own or given.sequences != 1):
        raise ValueError(f"{', '.join(own) or 'sequences'} without tokens: give tokens=[…], the lengths to measure")
    if given.cases and device.type == "cpu":
        raise ValueError(
            f"cases={given.cases[0]} on a CPU: dense attention would take hours there; run it on a GPU, or give "
            f"tokens=[…], the lengths to measure"
        )
    if not lengths and not given.cases:
        return list(CASES.values())
    made = [Case(f"{length:,}", given.sequences, length, **{**sizes, **own}) for length in lengths]
    return [*(CASES[name] for name in given.cases), *made]


def chosen_backends(given: BenchArguments, device: torch.device) -> list[str]:
    """
    Raises:
        ValueError: an unknown name.
    """
    from moba_train.attention import BACKENDS

    for name in given.backends:
        if name not in BACKENDS:
            raise ValueError(f"backends={name} is unknown: choose from {', '.join(BACKENDS)}")
    return list(dict.fromkeys(given.backends)) or ["triton" if device.type == "cuda" else "varlen"]


def machine(device: torch.device, arguments: list[str]) -> dict[str, Any]:
    """What a figure is worth nothing without."""
    import torch

    from moba_train import __version__

    about: dict[str, Any] = {"command": shlex.join(["moba-train", "bench", *arguments])}
    about["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    about |= {"moba_train": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cpu":
        return about | {"cpu": platform.machine(), "threads": torch.get_num_threads()}
    about |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    import triton

    return about | {"triton": triton.__version__}


def _print(lines: Iterator[str]) -> None:
    print("\n".join(lines), end="\n\n", flush=True)


def _draw(result: dict[str, Any], folder: Path) -> None:
    from moba_train.bench.figure import picture

    png = picture(result)
    if png is not None:
        (folder / "bench.png").write_bytes(png)
        print(f"written: {folder / 'bench.png'}")
