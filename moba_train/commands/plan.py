"""Does a recipe fit, and how fast is it: moba-train plan [key=value ...] [plan.key=value ...] [output=FILE.json]

Takes the settings of `moba-train train`, starts nothing and needs no GPU; of the model it reads config.json, unless
model.architecture tells its sizes. Prints the predicted memory of one GPU by part, the time of a step by part, what the
schedule takes, and what each switch would bring.

moba-train plan experiment=llama3_8b_1m launch.nodes=4      the recipe on 4 nodes
moba-train plan plan.gpu=H100 plan.network_gbs=20           on other hardware (moba_train/plan/hardware.py has all keys)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moba_train import durable, resolved
from moba_train.commands.compose import run_hydra
from moba_train.config import Config
from moba_train.cost import device_peak_flops
from moba_train.plan.advice import Switch, switches, together
from moba_train.plan.document import as_dict
from moba_train.plan.estimate import Estimate, StageEstimate, estimate
from moba_train.plan.hardware import PlanConfig, hardware
from moba_train.plan.memory import GB
from moba_train.plan.setup import refuse
from moba_train.validate import validate

console = Console()


@dataclass
class PlannedConfig(Config):
    """A recipe, and what ``plan`` assumes beside it."""

    plan: PlanConfig = field(default_factory=PlanConfig)
    output: str | None = None  # a JSON file with the same figures


def main(arguments: list[str]) -> int:
    run_hydra("train", _job, arguments, schema=PlannedConfig)
    return 0


def _job(composed: DictConfig) -> None:
    recipe = OmegaConf.masked_copy(composed, [str(key) for key in composed if key not in ("plan", "output")])
    config = resolved.to_config(recipe)
    settings = OmegaConf.to_object(composed.plan)
    assert isinstance(settings, PlanConfig)
    validate(config)
    show(config, settings, Path(composed.output).expanduser() if composed.output else None)


def show(config: Config, settings: PlanConfig, output: Path | None = None) -> None:
    """Print the tables, and write them as JSON."""
    from moba_train.model import planned_shape  # transformers takes seconds: a mistyped setting is told before

    machine = hardware(settings)
    shape = planned_shape(config.model, config.attention.key_conv)
    refuse(config, shape)
    found = estimate(config, shape, machine)
    offered = switches(found, config)
    chosen = [] if found.fits else together(found, config)
    _print_head(found, config)
    console.print(_stage_table(found))
    largest = max(found.stages, key=lambda stage: stage.memory.needed)
    console.print(_memory_table(largest, found))
    console.print(_time_table(found))
    _print_verdict(found, chosen)
    if offered:
        console.print(_switch_table(found, offered))
    if output is not None:
        durable.write(output, json.dumps(as_dict(found, offered, chosen), indent=2) + "\n")
        _line(f"written: {escape(str(output))}")


def _print_head(found: Estimate, config: Config) -> None:
    shape, machine = found.stages[0].setup.shape, found.hardware
    setup = found.stages[0].setup
    where = f"{setup.nodes} nodes x {setup.gpus_per_node}" if setup.nodes > 1 else f"{found.world_size}"
    source = "measured" if machine.measured else "scaled from an H200's by data sheet"
    _line(
        f"[bold]{escape(config.model.name)}[/]: {shape.parameters / 1e9:.2f} billion parameters on {where} "
        f"{machine.gpu} of {machine.memory_gb:g} GB (rates {source}), a step of {config.train.tokens_per_step:,} tokens"
    )
    attention: dict[str, list[str]] = {}
    for each in found.stages:
        attention.setdefault(each.setup.stage.describe().split(", ")[0], []).append(each.setup.stage.name)
    kinds = [f"{kind} in {', '.join(names)}" for kind, names in attention.items()]
    _line(f"attention: {'; '.join(kinds)}")


def _stage_table(found: Estimate) -> Table:
    table = Table(title="stages", title_justify="left")
    _columns(table, "stage", "context", "steps", "GB a GPU", "s a step", "tokens/s", "MFU", "time")
    for each in found.stages:
        stage = each.setup.stage
        table.add_row(
            stage.name,
            f"{stage.context_length:,}",
            f"{stage.steps:,}",
            f"{each.memory.needed / GB:.1f}",
            f"{each.time.total:.3g}",
            f"{each.tokens_per_second:,.0f}",
            _utilization(each, found),
            _duration(each.seconds),
        )
    return table


def _utilization(each: StageEstimate, found: Estimate) -> str:
    peak = device_peak_flops(found.hardware.gpu)
    return f"{each.cost.model_flops / each.time.total / (peak * found.world_size):.0%}" if peak else ""


def _amount(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _memory_table(largest: StageEstimate, found: Estimate) -> Table:
    """Of the stage that needs most, its parts at the moment that needs most."""
    memory = largest.memory
    table = Table(
        title=f"memory of one GPU, stage {largest.setup.stage.name}, at its peak: {memory.peak_moment}",
        title_justify="left",
    )
    _columns(table, "part", "GB")
    for name, size in sorted(memory.parts.items(), key=lambda part: -part[1]):
        if size:
            table.add_row(name, f"{size / GB:.2f}")
    table.add_row("peak in torch's allocator", f"{memory.peak / GB:.2f}", style="bold")
    table.add_row("and what it cannot use, CUDA, NCCL", f"{(memory.needed - memory.peak) / GB:.2f}")
    table.add_row(f"needed, of {found.hardware.memory_gb:g}", f"{memory.needed / GB:.2f}", style="bold")
    if memory.host:
        node = memory.host * largest.setup.gpus_per_node
        room = f" of {found.hardware.host_memory_gb:g}" if found.hardware.host_memory_gb else ""
        table.add_row(f"pinned host memory of a node{room}", f"{node / GB:.2f}")
    return table


def _time_table(found: Estimate) -> Table:
    table = Table(title="seconds of a step", title_justify="left")
    _columns(table, "part", *(each.setup.stage.name for each in found.stages))
    for name in dict.fromkeys(name for each in found.stages for name in each.time.parts):
        table.add_row(name, *(f"{each.time.parts.get(name, 0):.3g}" for each in found.stages))
    return table


def _switch_table(found: Estimate, offered: list[Switch]) -> Table:
    unknown = any(not switch.estimate.host_is_known for switch in offered)
    caption = "GB?: with so many GB of a node's memory, which plan.host_memory_gb would tell" if unknown else None
    table = Table(title="what a switch brings, each by itself", title_justify="left", caption=caption)
    _columns(table, "setting", "saves GB", "needs GB", "time", "fits")
    for switch in offered:
        table.add_row(
            switch.text,
            f"{switch.saved / GB:.1f}",
            f"{switch.estimate.needed / GB:.1f}",
            f"{switch.slowdown - 1:+.1%}",
            _fits(switch.estimate),
        )
    return table


def _short(found: Estimate) -> str:
    """What a recipe needs more of than there is."""
    machine = found.hardware
    needs = []
    if not found.fits_gpu:
        needs.append(f"{found.needed / GB:.1f} GB of {machine.memory_gb:g}")
    if not found.fits_host:
        needs.append(f"{found.host / GB:.1f} GB of a node's {machine.host_memory_gb:g}")
    return ", ".join(needs)


def _fits(found: Estimate) -> str:
    if not found.fits:
        return "no"
    return "yes" if found.host_is_known else f"{found.host / GB:.0f} GB?"


def _print_verdict(found: Estimate, chosen: list[Switch]) -> None:
    if found.fits:
        verdict = "[green]It fits.[/]"
        if not found.host_is_known:
            verdict = (
                f"[green]It fits the GPU[/], if a node has {found.host / GB:.0f} GB of memory to pin: tell what it has "
                f"with plan.host_memory_gb."
            )
        _line(
            f"{verdict} The schedule takes {_duration(found.seconds)}, {_amount(found.gpu_hours)} GPU hours, "
            f"without evaluation and checkpoints"
        )
        return
    _line(f"[red]It does not fit:[/] {_short(found)}")
    if chosen:
        last = chosen[-1].estimate
        settings = " ".join(switch.text for switch in chosen)
        verdict = f"{last.needed / GB:.1f} GB, {last.seconds / found.seconds - 1:+.1%} time"
        if last.host:
            verdict += f", {last.host / GB:.0f} GB of a node's memory"
        _line(
            f"with {settings}: {verdict}" + ("" if last.fits else ", still too much: more GPUs, or a shorter context")
        )


def _columns(table: Table, first: str, *others: str) -> None:
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)


def _line(text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False)
