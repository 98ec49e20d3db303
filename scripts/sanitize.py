"""compute-sanitizer over every kernel once, at small shapes: python scripts/sanitize.py [memcheck racecheck …]

Each family of kernels runs in processes of its own: once without the tool, which compiles them, then under each tool. A
family ``wrong`` has what the tools must find. Full reports go to sanitize/; the exit code is 1 where a tool found
something, found nothing in ``wrong``, or did not end. compute-sanitizer before 2026.1 takes handovers between warps of
the Hopper kernels for hazards; `pip install nvidia-cuda-sanitizer-api` brings a later one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

SECONDS = 150  # of a process
PROCESSES = 16  # at a time
OPTIONS = {
    "memcheck": [],
    "racecheck": [],
    "synccheck": [],
    # It reads rows a tile ahead, those of the last tile too, which none wrote and which it drops. On a GPU a test fills
    # what none wrote with other numbers (test_kernels_gpu.py).
    "initcheck": ["--kernel-name-exclude", "kns=key_value_kernel"],
}
SHORT = ["--print-limit", "500", "--show-backtrace", "no", "--kernel-name-exclude", "kns=at6native"]
FAMILIES: dict[str, dict[str, Any]] = {  # segments, heads, kv heads, head_dim, block_size, top_k
    "small blocks": dict(lengths=(150, 0, 33), heads=4, kv_heads=2, head_dim=64, block_size=16, top_k=3),
    "other blocks": dict(lengths=(650, 120), heads=2, kv_heads=1, head_dim=96, block_size=200, top_k=3),
    "Hopper, one key tile": dict(lengths=(700, 0, 333), heads=2, kv_heads=2, head_dim=128, block_size=128, top_k=3),
    "Hopper, several key tiles": dict(lengths=(1100, 77), heads=4, kv_heads=2, head_dim=128, block_size=256, top_k=4),
    "Hopper, head_dim 64": dict(lengths=(1100, 77), heads=2, kv_heads=1, head_dim=64, block_size=256, top_k=3),
    "Hopper, own block alone": dict(lengths=(700, 77), heads=2, kv_heads=1, head_dim=128, block_size=384, top_k=1),
    "Hopper, one choice": dict(lengths=(1500, 77), heads=8, kv_heads=1, head_dim=128, block_size=384, top_k=2),
    "Hopper, long blocks": dict(lengths=(2200, 77), heads=1, kv_heads=1, head_dim=128, block_size=2048, top_k=2),
    "Hopper, rising scores": dict(
        lengths=(1100, 77), heads=2, kv_heads=1, head_dim=128, block_size=256, top_k=3, rise=60
    ),
    # More blocks than Hopper's kernels have room to sort by: Triton's make the lists.
    "many blocks": dict(lengths=(150, *[0] * 8192, 33), heads=2, kv_heads=1, head_dim=64, block_size=16, top_k=3),
    "Hopper, selection": dict(lengths=(3000, 77), heads=4, kv_heads=2, head_dim=128, block_size=16, top_k=8),
    "cross entropy": {},
    "wrong": {},
}


ONE_PLACE = tl.constexpr("{ .reg .b32 a; mov.b32 a, 0; st.shared.b32 [a], $1; mov.b32 $0, $1; }")


@triton.jit
def wrong_kernel(p_in, p_out, n):
    """Reads and writes past the end of both; threads write one place of shared memory."""
    o = tl.arange(0, 1024)
    b = tl.load(p_in + o)
    tl.inline_asm_elementwise(ONE_PLACE, "=r,r", [o], tl.int32, False, 1)
    tl.store(p_out + o, b + tl.sum(b, 0) + n)


def attention(
    lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, block_size: int, top_k: int, rise: int = 1
) -> None:
    from moba_train.attention.kernels.op import triton_attention
    from moba_train.attention.spec import AttentionSpec

    # Made on the CPU: the tools' time goes into the kernels alone.
    make = [torch.randn(sum(lengths), n, head_dim).bfloat16().cuda() for n in (heads, kv_heads, kv_heads, heads)]
    make[1][torch.arange(sum(lengths)).cuda() % block_size >= 128] *= rise
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    inputs = [x.requires_grad_() for x in make[:3]]
    out = triton_attention(*inputs, bounds, max(lengths), AttentionSpec("moba", block_size, top_k), head_dim**-0.5)
    results = (out, *torch.autograd.grad(out, inputs, make[3]))
    assert all(x.detach().cpu().isfinite().all() for x in results)


def run(family: str) -> None:
    """In this process; prints the names of the project's kernels that ran."""
    torch.manual_seed(0)
    names: set[str] = set()
    triton.knobs.runtime.launch_enter_hook.add(lambda launch: names.add(launch.get()["name"]))
    if family == "cross entropy":
        from moba_train.layers.cross_entropy_kernel import cross_entropy

        logits, targets = torch.randn(5, 40000).cuda(), torch.tensor([3, -100, 39999, 0, 7]).cuda()
        assert cross_entropy(logits, targets, -100).cpu().isfinite().all()
    elif family == "wrong":
        wrong_kernel[(1,)](*(torch.empty(1000, dtype=torch.int32, device="cuda") for _ in "io"), 7)
        torch.cuda.synchronize()
    else:
        attention(**FAMILIES[family])
    print(*(f"ran {name}" for name in sorted(names)), sep="\n")


def report_name(tool: str, family: str) -> str:
    return re.sub(r"\W+", "_", f"{tool} {family}") + ".txt"


def started(command: list[str], log: Path, **environment: str) -> tuple[str, str]:
    """What a process says, and a line's end: its time."""
    start = time.monotonic()
    with log.open("w") as file:
        try:
            subprocess.run(
                command, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            file.write("\ncut off\n")
    return log.read_text(errors="replace"), f"{time.monotonic() - start:4.0f} s"


def alone(family: str, folder: Path) -> set[str]:
    """The kernels of a family that ran, which are compiled then."""
    text, seconds = started([sys.executable, __file__, "--run", family], folder / report_name("alone", family))
    ran = set(re.findall(r"^ran (\w+)$", text, re.MULTILINE))
    print(f"{'alone':10} {family:26} {len(ran):3} kernels  {seconds}", "" if ran else text[-2000:], flush=True)
    return ran


def check(tool: str, family: str, folder: Path) -> bool:
    """Whether a tool found what it should: nothing, but in ``wrong``."""
    command = ["compute-sanitizer", "--tool", tool, *SHORT, *OPTIONS[tool]]
    command += [sys.executable, __file__, "--run", family]
    # Without PyTorch's pool each tensor ends where its memory ends.
    text, seconds = started(command, folder / report_name(tool, family), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    ended = bool(summary) and (summary[-1] != "0" or "\nran " in text)
    found = f"{summary[-1]} found" if ended else "did not end"
    where = Counter(re.findall(r" (\w+_kernel)\+", text)).most_common(4)
    print(f"{tool:10} {family:26} {found:12} {seconds}", *(f"{name} x{n}" for name, n in where), flush=True)
    return ended and (found != "0 found") == (family == "wrong")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", choices=[*OPTIONS, []], help="all, where none is named")
    parser.add_argument("--run", choices=FAMILIES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path("sanitize"), help="of the full reports")
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments.run)
        return 0
    if shutil.which("compute-sanitizer") is None:
        sys.exit("compute-sanitizer is not on the PATH: the CUDA toolkit has it, and pip's nvidia-cuda-sanitizer-api")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    package = Path(__file__).parents[1] / "moba_train"
    sources = "\n".join(file.read_text() for file in package.rglob("*.py"))
    defined = set(re.findall(r"jit(?:\(.*\))?\ndef (\w+_kernel)\(", sources))
    with ThreadPoolExecutor(min(PROCESSES, os.cpu_count() or 1)) as pool:
        ran = set().union(*pool.map(lambda family: alone(family, arguments.folder), FAMILIES))
        print("not run:", *sorted(defined - ran))
        pairs = [(tool, family) for tool in arguments.tools or OPTIONS for family in FAMILIES]
        pairs = [pair for pair in pairs if pair != ("synccheck", "wrong")]  # which has no wrong barrier
        right = list(pool.map(lambda pair: check(*pair, arguments.folder), pairs))
    return 0 if all(right) and defined <= ran else 1


if __name__ == "__main__":
    sys.exit(main())
