"""A run's configuration on disk: composed config → dataclasses → ``resolved.yaml`` → dataclasses in the worker."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moba_train import config as schema
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
# Where documents lie may change too: a checkpoint knows them by their tokens.
_DOCUMENTS = re.compile(r"data\.(train|heldout)\.\d+\.path")
_UNKNOWN = re.compile(r"Key '(.+)' not in '(\w+)'")


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
    except OmegaConfBaseException as error:
        raise ValueError(describe(error)) from None
    assert isinstance(config, Config)
    _check_entries(config)
    return config


def _check_entries(part: Any, key: str = "") -> None:
    """Check the entries of lists of plain values, which OmegaConf does only as it makes a structure of a dataclass, and
    then names by no more than their own dataclass's key: so the innermost ones come first."""
    for field in fields(part):
        value = getattr(part, field.name)
        entries = [(f"{field.name}[{i}]", entry) for i, entry in enumerate(value)] if isinstance(value, list) else []
        for name, inner in entries or [(field.name, value)]:
            if is_dataclass(inner):
                _check_entries(inner, f"{key}{name}.")
    try:
        OmegaConf.structured(part)
    except OmegaConfBaseException as error:
        raise ValueError(f"{key}{describe(error)}") from None


def _check_stage(index: int, stage: Any) -> None:
    # OmegaConf's own message of a fault inside a list leaves out where in the list it is.
    try:
        OmegaConf.merge(OmegaConf.structured(StageConfig), stage)
    except OmegaConfBaseException as error:
        raise ValueError(f"schedule.stages[{index}]: {describe(error)}") from None


def describe(error: OmegaConfBaseException) -> str:
    """OmegaConf's message in one line, with the full key where the first line does not name it, and the nearest of an
    unknown key."""
    lines = [line.strip() for line in str(error).splitlines()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    said = lines[0] if not key or key in lines[0] else f"{key}: {lines[0]}"
    return "; ".join(part for part in (said, nearest_key(lines[0], key), written_out(said)) if part)


def written_out(refusal: str) -> str:
    """What to write in place of 1e9 or 8k, where OmegaConf says that it is no integer; "" where it says something
    else."""
    return "write whole numbers out, as 1_000_000" if "could not be converted to Integer" in refusal else ""


def nearest_key(refusal: str, key: str) -> str:
    """What to write in place of an unknown ``key``, where OmegaConf says "Key 'x' not in 'AttentionConfig'"; "" where
    it says something else."""
    found = _UNKNOWN.search(refusal)
    group = found and getattr(schema, found[2], None)
    if not found or group is None:
        return ""
    names = [field.name for field in fields(group)]
    before = key.removesuffix(found[1]) if key.endswith(f".{found[1]}") else ""
    if nearest := get_close_matches(found[1], names, 1):
        return f"did you mean {before}{nearest[0]}?"
    if elsewhere := [known for known in keys() if known.split(".")[-1] == found[1]]:
        return f"did you mean {elsewhere[0]}?"
    return f"choose from {', '.join(names)}"


def to_yaml(config: Config) -> str:
    """YAML of the whole configuration, without secrets."""
    return OmegaConf.to_yaml(OmegaConf.create(redact(OmegaConf.to_container(OmegaConf.structured(config)))))


def secrets(config: Config) -> list[str]:
    """Settings that ``to_yaml`` hides."""
    written = _flatten(redact(OmegaConf.to_container(OmegaConf.structured(config))))
    return [key for key, value in _flat(config).items() if isinstance(value, str) and written[key] != value]


def load(path: Path) -> Config:
    """The configuration of a run directory's ``resolved.yaml``."""
    return _to_config(read(path), path)


def read(path: Path) -> DictConfig:
    """The settings of a run directory's ``resolved.yaml`` as they stand there, of whatever version they are."""
    try:
        composed = OmegaConf.load(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}): restore it") from None
    if not isinstance(composed, DictConfig) or not composed:
        raise ValueError(f"{path} holds no settings: choose another run.name, or remove the file")
    return composed


def from_yaml(text: str, path: Path) -> Config:
    """The configuration that ``to_yaml`` wrote into ``path``."""
    composed = OmegaConf.create(text)
    assert isinstance(composed, DictConfig)
    return _to_config(composed, path)


def _to_config(composed: DictConfig, path: Path) -> Config:
    try:
        return to_config(composed)
    except ValueError as error:  # damaged, or of a moba_train with other settings
        raise ValueError(f"{path}: {error}") from None


def differences(before: Config, after: Config) -> list[str]:
    """Settings that differ and would make the continued run another run, as ``key: before -> after``."""
    old, new = (_flat(config) for config in (before, after))
    return [
        f"{key}: {_shown(old.get(key))} -> {_shown(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(RESUMABLE) and not _DOCUMENTS.fullmatch(key)
    ]


def _shown(value: Any) -> str:
    return value.name if isinstance(value, Enum) else str(value)


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
