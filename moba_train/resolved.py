"""A run's configuration on disk: composed config → dataclasses → ``resolved.yaml`` → dataclasses in the worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moba_train.config import Config, StageConfig
from moba_train.redact import redact

FILE = "resolved.yaml"

# What may change between the start of a run and its continuation. The store may lie elsewhere, since a checkpoint knows
# the content of the store it was trained on; another device or number of threads alters rounding, told on resume. What
# saves memory alters rounding at most, so that a run which ended for want of memory goes on with more of it.
RESUMABLE = (
    "run.resume",
    "run.label",
    "run.dir",
    "run.name",
    "data.store_dir",
    "data.rebuild",
    "data.threads",
    "wandb.",
    "launch.",
    "checkpoint.",
    "train.log_every",
    "train.nonfinite_limit",
    "train.sequence_parallel_size",
    "train.zero_stage",
    "train.offload.",
    "train.micro_batch_tokens",
    "train.activation_checkpointing",
    "train.keep_choices",
    "train.keep_attention",
    "train.loss_tile_tokens",
    "train.mlp_tile_tokens",
    "train.gradient_dtype",
    "train.reduction_dtype",
    "train.fused_kernels",
    "attention.backend",
    "train.profile_steps",
    "position_loss.log_every",
)


def to_config(composed: DictConfig) -> Config:
    """The dataclasses of a composed configuration.

    Raises:
        ValueError: one line naming the key, for a value of the wrong type or a key that does not exist.
    """
    try:
        # As plain values: a key that Hydra's "+key=" added past the schema would be dropped in silence.
        plain = OmegaConf.create(OmegaConf.to_container(composed, resolve=True))
        for index, stage in enumerate(OmegaConf.select(plain, "schedule.stages") or []):
            _check_stage(index, stage)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
        OmegaConf.structured(config)  # which alone checks the entries of lists of plain values
    except OmegaConfBaseException as error:
        raise ValueError(describe(error)) from None
    assert isinstance(config, Config)
    return config


def _check_stage(index: int, stage: Any) -> None:
    # OmegaConf's own message of a fault inside a list leaves out where in the list it is.
    try:
        OmegaConf.merge(OmegaConf.structured(StageConfig), stage)
    except OmegaConfBaseException as error:
        raise ValueError(f"schedule.stages[{index}]: {describe(error)}") from None


def describe(error: OmegaConfBaseException) -> str:
    """OmegaConf's message in one line, with the full key where the first line does not name it."""
    lines = [line.strip() for line in str(error).splitlines()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    return lines[0] if not key or key in lines[0] else f"{key}: {lines[0]}"


def to_yaml(config: Config) -> str:
    """YAML of the whole configuration, without secrets."""
    return OmegaConf.to_yaml(OmegaConf.create(redact(OmegaConf.to_container(OmegaConf.structured(config)))))


def secrets(config: Config) -> list[str]:
    """Settings that ``to_yaml`` hides."""
    written = _flatten(redact(OmegaConf.to_container(OmegaConf.structured(config))))
    return [key for key, value in _flat(config).items() if isinstance(value, str) and written[key] != value]


def load(path: Path) -> Config:
    """The configuration of a run directory's ``resolved.yaml``."""
    try:
        composed = OmegaConf.load(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(composed, DictConfig) or not composed:
        raise ValueError(f"{path} holds no settings: choose another run.name, or remove the file")
    return to_config(composed)


def differences(before: Config, after: Config) -> list[str]:
    """Settings that differ and would make the continued run another run, as ``key: before -> after``."""
    old, new = (_flat(config) for config in (before, after))
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(RESUMABLE)
    ]


def _flat(config: Config) -> dict[str, Any]:
    """Every setting by its dotted key."""
    return _flatten(OmegaConf.to_container(OmegaConf.structured(config)))


def keys() -> list[str]:
    """Every setting of a configuration that is all defaults, by its full key."""
    return list(_flat(Config()))


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        pairs = value.items()
    elif isinstance(value, list) and value:
        pairs = enumerate(value)  # type: ignore[assignment]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in pairs:
        flat.update(_flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat
