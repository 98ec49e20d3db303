"""A checkpoint of DeepSpeed's engine for another number of ranks or ZeRO stage, through its universal checkpoint.

The universal form has a folder a parameter, with the whole of it and of its moments in fp32 (``fp32.pt``,
``exp_avg.pt``, ``exp_avg_sq.pt``) and its ``step.pt``. DeepSpeed converts from ZeRO 1, 2 and 3, but each of its loaders
wants the form that its own stage converts to. So every conversion ends here in one form that all of them read, and ZeRO
0, which DeepSpeed leaves out, is read and written here.

DeepSpeed reads its files with pickle: only those that a manifest has vouched for may come here.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moba_train.optimizer import parameter_groups

_MOMENTS = ("exp_avg", "exp_avg_sq")
# What DeepSpeed reads of the model's file beside weights; under the names that ZeRO 0-2 and ZeRO 3 give the file.
_COUNTERS = ("dp_world_size", "mp_world_size", "global_steps", "global_samples", "skipped_steps")
_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def convert(source: Path, target: Path, zero_stage: int, module: nn.Module) -> None:
    """Write the universal form of ``source``, an engine's folder saved at ``zero_stage``, into a new folder ``target``.

    ``module`` is the engine's, at any stage: its parameters' names and shapes are those of the checkpoint. It needs
    room for the parameters and moments in fp32 twice, and one process's time: no other rank has a part in it.
    """
    zero = target / "zero"
    if zero_stage == 0:
        step = _write_unpartitioned(source, zero, module)
    else:
        _convert_partitioned(source, target)
        step = _step(zero)
    for name, parameter in module.named_parameters():
        for kind in ("fp32", *_MOMENTS):
            file = zero / name / f"{kind}.pt"
            value = _read(file)
            value = value["param"] if isinstance(value, dict) else value
            torch.save({"param": value.detach().view(_shape(parameter))}, file)
        torch.save(step.clone(), zero / name / "step.pt")
    # Without hyperparameters: they are settings, and ZeRO 3's loader would give those of the first group to all.
    groups: list[dict] = [{} for _ in parameter_groups(module, 0.0)]
    state = {"state": {0: {"step": step}}, "param_groups": groups}
    torch.save(
        {"optimizer_state_dict": state, "param_groups": groups, "ds_version": _version()}, zero / "optimizer_state.pt"
    )
    model_file = next(file for name in _MODEL_FILES if (file := source / name).exists())
    counters = _read(model_file, mmap=True)
    for left in target.glob("*.pt"):
        left.unlink()
    for name in _MODEL_FILES:
        torch.save({"module": {}, **{key: counters[key] for key in _COUNTERS}}, target / name)


def load(folder: Path, tag: str, engine: Any) -> None:
    """Give ``engine`` the parameters, moments and counters that ``convert`` wrote to ``folder/tag``; on all ranks."""
    if engine.zero_optimization_stage() == 0:
        _load_unpartitioned(folder / tag, engine)
        return
    # As "checkpoint": {"load_universal": true} of the engine's configuration, which it was made without.
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(folder), tag=tag)
    finally:
        engine._config.load_universal_checkpoint = False
    # ZeRO 3's loader gives one tensor to all its groups, and torch's AdamW counts in place.
    optimizer = engine.optimizer.optimizer
    for state in optimizer.state.values():
        if "step" in state:
            device = state["exp_avg"].device if optimizer.defaults["fused"] else "cpu"
            state["step"] = state["step"].clone().to(device)


def _convert_partitioned(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,  # more are forked, from a process that may hold a GPU
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        ds_to_universal.main(arguments)
    (target.parent / "latest_universal").unlink()


def _step(zero: Path) -> torch.Tensor:
    """Optimizer steps done, as a conversion from ZeRO 1-2 (with each parameter) or 3 (with the rest) tells it."""
    for file in zero.glob("*/step.pt"):
        step = _read(file)
        break
    else:
        step = _read(zero / "optimizer_state.pt")["optimizer_state_dict"]["state"][0]["step"]
    return torch.as_tensor(step, dtype=torch.float32)


def _write_unpartitioned(source: Path, zero: Path, module: nn.Module) -> torch.Tensor:
    saved = _read(source / _MODEL_FILES[0], mmap=True)
    for index, (name, _) in enumerate(_in_optimizer_order(module)):
        state = saved["optimizer"]["state"][index]
        (zero / name).mkdir(parents=True)
        for kind, value in {"fp32": saved["module"][name], **{kind: state[kind] for kind in _MOMENTS}}.items():
            torch.save(value, zero / name / f"{kind}.pt")
    return state["step"]


def _load_unpartitioned(folder: Path, engine: Any) -> None:
    state = {}
    for index, (name, parameter) in enumerate(_in_optimizer_order(engine.module)):
        parts = folder / "zero" / name
        values = {kind: _read(parts / f"{kind}.pt")["param"] for kind in ("fp32", *_MOMENTS)}
        parameter.data.copy_(values.pop("fp32"))
        state[index] = {**values, "step": _read(parts / "step.pt")}
    settings = engine.optimizer.state_dict()["param_groups"]
    engine.optimizer.load_state_dict({"state": state, "param_groups": settings})
    counters = _read(folder / _MODEL_FILES[0])
    engine.global_steps, engine.global_samples = counters["global_steps"], counters["global_samples"]
    engine.skipped_steps = counters["skipped_steps"]


def _in_optimizer_order(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters in the order by which an unpartitioned optimizer's state numbers them."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for group in parameter_groups(module, 0.0):
        for parameter in group["params"]:
            yield names[id(parameter)], parameter


def _read(file: Path, mmap: bool = False) -> Any:
    """Onto the CPU: tensors of a GPU would otherwise all come back to that one. ``mmap`` only where ``file`` stays."""
    return torch.load(file, map_location="cpu", weights_only=False, mmap=mmap)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # of a parameter that ZeRO 3 has partitioned


def _version() -> str:
    import deepspeed

    return deepspeed.__version__
