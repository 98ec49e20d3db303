"""One-way floors: a module imports only modules of lower floors, or of its own package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moba_train"

# From the ground up. A package (attention, data, …) is one floor's worth: inside it imports are free.
FLOORS = [
    "config durable embedded hub redact metrics_file meeting attention",
    "layers offload host_moments result_file",
    "runtime cost loss rope optimizer data resolved validate hf_attention recompute key_conv_folder",
    "schedule tracking model metrics fetch observe profiler skipped summary",
    "batch parallel export report",
    "checkpoint",
    "assemble evaluate preflight plan bench",
    "run",
    "train_step",
    "train",
    "worker",
    "commands",
    "cli",
    "__main__",
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names.split()}

# What may import them, beside the floors: seams that keep a heavy or an awkward library in one place.
ONLY = {
    "deepspeed": {"parallel.engine", "parallel.sequence", "parallel.universal", "export"},
    "hydra": {"commands.compose", "commands.refusals", "commands.train"},
    "wandb": {"tracking"},
}


def modules() -> dict[str, Path]:
    return {
        ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
        for file in sorted(PACKAGE.rglob("*.py"))
        if file != PACKAGE / "__init__.py" and "embedded" not in file.relative_to(PACKAGE).parts[:-1]
    }


def imports(file: Path) -> set[str]:
    """Dotted names of everything a file imports, at its top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floors_below(file: Path) -> set[str]:
    own = [name.split(".")[1] for name in imports(file) if re.match(r"moba_train\.\w", name)]
    return {name for name in own if name != "__version__"}


def test_every_module_has_a_floor() -> None:
    assert {name.split(".")[0] for name in modules()} == set(FLOOR)


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_lower_floors_only(module: str) -> None:
    top = module.split(".")[0]
    # The command line finds its verbs by name.
    upward = {name for name in floors_below(modules()[module]) if name != top and FLOOR[name] >= FLOOR[top]}
    assert not upward, f"{module} (floor {FLOOR[top]}) imports {sorted(upward)}"


def test_attention_stands_alone() -> None:
    for module, file in modules().items():
        if module.split(".")[0] == "attention":
            assert floors_below(file) <= {"attention"}, f"{module} depends on the rest of the package"


@pytest.mark.parametrize("library", ONLY)
def test_libraries_that_live_in_one_place(library: str) -> None:
    users = {
        module for module, file in modules().items() if any(name.split(".")[0] == library for name in imports(file))
    }
    assert users <= ONLY[library]


def test_settings_are_checked_without_torch() -> None:
    """A mistyped key must not wait for torch: nothing that the command line imports at its top may need it."""
    of_ranks = {"parallel.engine", "parallel.nvme", "parallel.sequence", "parallel.universal"}
    of_ranks |= {"parallel.probe"}  # where GPUs are to be counted
    launching = [name for name in modules() if name.startswith("parallel.") and name not in of_ranks]
    for module in (
        "config",
        "validate",
        "resolved",
        "redact",
        "embedded",
        "commands.compose",
        "commands.refusals",
        *launching,
    ):
        names = {name.split(".")[0] for name in imports(modules()[module])}
        assert not names & {"torch", "transformers", "deepspeed"}, module


def test_files_stay_short() -> None:
    lengths = {name: len(file.read_text().splitlines()) for name, file in modules().items()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
    assert "utils" not in {name.split(".")[-1] for name in lengths}
