"""The Gluon kernels compile for Hopper, on any machine: Gluon has no interpreter, and its names change with Triton."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

INTEGERS = {"bounds", "lists", "of_list", "offsets", "entries", "padded", "padded_row"} | {
    "first",
    "of_token",
    "choice",
    "count",
    "offset",
    "entry",
}
FLOATS = {"lse", "delta", "padded_lse", "padded_delta", "partial_lse"}
ROWS = {"query", "d_out"}
LOG2_E = 1.44
KEY_VALUE = {"LOG2_E": LOG2_E, "R": 2, "BLOCK_M": 64}
OWN = {"G": 4, "R": 2, "D": 128, "BLOCK_N": 128, "STAGES": 4}
SIZES = {
    "forward": {"WIDTH": 2, "B": 256, **OWN},
    "forward 64": {"WIDTH": 3, "B": 256, **OWN, "D": 64},
    "resident": {"G": 1, "R": 2, "D": 128, "BLOCK_N": 128, "STAGES": 3},
    "query": {"LOG2_E": LOG2_E, "B": 256, **OWN, "STAGES": 2},
    "query_narrow": {"LOG2_E": LOG2_E, "B": 256, **OWN, "D": 64, "BLOCK_N": 64, "STAGES": 6},
    "query_short": {"LOG2_E": LOG2_E, "B": 256, **OWN, "BLOCK_N": 64},
    "route count": {"R": 7, "GR": 28, "NONE": 255, "BLOCK_E": 1024, "BLOCK_N": 2048},
    "route fill": {"R": 7, "GR": 28, "NONE": 255, "ROWS": 16, "BLOCK_E": 128, "BLOCK_N": 2048, "ENTRIES": 4096},
    "select": {"G": 4, "R": 7, "NONE": 255, "LOWEST": -1e38, "D": 128, "BLOCK_N": 64, "STAGES": 3},
    "key_value": {**KEY_VALUE, "QUERY": True, "AHEAD": False, "G": 1, "TILES": 1, "D": 128, "STAGES": 3},
    "key_value dK": {**KEY_VALUE, "QUERY": False, "AHEAD": False, "G": 4, "TILES": 4, "D": 128, "STAGES": 3},
    "key_value 64": {**KEY_VALUE, "QUERY": False, "AHEAD": True, "G": 4, "TILES": 4, "D": 64, "STAGES": 4},
    "own_forward": OWN,
    "own_query": {"LOG2_E": LOG2_E, **OWN},
    "own_short": {"LOG2_E": LOG2_E, **OWN, "BLOCK_N": 64, "STAGES": 8},
    "own_short 64": {"LOG2_E": LOG2_E, **OWN, "D": 64, "BLOCK_N": 64, "STAGES": 8},
}


def argument_type(name: str, tile: int, head_dim: int) -> str:
    from triton.experimental.gluon import language as gl

    kind, _, what = name.partition("_")
    if kind == "d":
        shape = [16, 4, head_dim] if what in ROWS else [tile, head_dim]
        layout = gl.NVMMASharedLayout.get_default_for(shape, gl.bfloat16)
        return f"tensordesc<bf16{shape},{layout!r}>"
    if kind == "p":
        return "*i32" if what in INTEGERS else "*fp32" if what in FLOATS else "*bf16"
    return "fp32" if name == "scale" else "i32"


def compile_kernel(name: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from moba_train.attention.kernels import hopper

    what, *which = name.split()
    kernels = {key: value for key, value in vars(getattr(hopper, what)).items() if key.endswith("_hopper_kernel")}
    (kernel,) = (value for key, value in kernels.items() if what != "route" or which[0] in key)
    tile = 64 if what == "key_value" else SIZES[name]["BLOCK_N"]
    sizes, names = SIZES[name], kernel.arg_names
    source = GluonASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in sizes else argument_type(n, tile, sizes.get("D", 0)) for n in names},
        constexprs={(names.index(n),): value for n, value in sizes.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.startswith("p_")},
    )
    programs = 2 if name == "resident" else 1  # a multiprocessor, which keeps 1 KiB for each
    options = {"num_warps": 8 if name == "route fill" else 4}
    options |= {"maxnreg": hopper.resident.REGISTERS} if programs > 1 else {}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= (228 << 10) // programs - (1 << 10)
    if what == "route":  # what it allocates is all there is, and so at the start of shared memory
        assert compiled.metadata.shared == (4 * (8 * 2048 + 4096) + 4096 if name == "route fill" else 4 * 2048)
        return
    assert "wgmma.mma_async" in compiled.asm["ptx"] and "setmaxnreg" in compiled.asm["ptx"]
    # Memory that no partition takes may share its bytes with what warp_specialize hands over; setting up a barrier
    # there made that wrong now and then.
    before, _, after = compiled.asm["ttgir"].partition("ttg.warp_specialize(")
    # What is handed over, and what the warps that hand over go on with, by itself or as another view.
    taken = {*re.findall(r"%\w+", after.partition(" partition0(")[0])}
    taken |= {whole for view, whole in re.findall(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", before) if view in taken}
    made = {*re.findall(r"(%\w+) = ttg\.local_alloc : \(\)", before)}
    assert made and made <= taken, f"{made - taken} is in no partition"


@pytest.fixture(scope="module")
def compiled() -> subprocess.CompletedProcess[str]:
    """In a process of its own: Triton's compiler has much to say at the end of one, and may abort it."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.run([sys.executable, __file__], env=environment, cwd=root, capture_output=True, text=True)


@pytest.mark.parametrize("name", SIZES)
def test_it_compiles(compiled: subprocess.CompletedProcess[str], name: str) -> None:
    assert f"compiled {name}" in compiled.stdout.splitlines(), compiled.stderr[-3000:]


def test_another_gluon_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    call = pytest.importorskip("moba_train.attention.kernels.call")
    call._gluon_kernels.cache_clear()
    monkeypatch.delattr("moba_train.attention.kernels.hopper", raising=False)
    monkeypatch.setitem(sys.modules, "moba_train.attention.kernels.hopper", None)
    assert call._gluon_kernels() is None and call._gluon_kernels() is None
    call._gluon_kernels.cache_clear()
    (message,) = caplog.messages
    assert "another Gluon" in message


if __name__ == "__main__":
    for each in SIZES:
        try:
            compile_kernel(each)
            print("compiled", each, flush=True)
        except Exception:
            traceback.print_exc()
