"""Hydra, for the verbs that take a whole configuration: the only place that composes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moba_train import embedded
from moba_train.config import Config

_LONGEST_NAME = 120  # of a sweep's run directory; file systems stop at 255 bytes


def run_hydra(
    config_name: str, job: Callable[[DictConfig], object], arguments: list[str], schema: type[Config] = Config
) -> None:
    """Compose ``configs/<config_name>.yaml`` with the overrides and call ``job``, once a point of a sweep.

    Args:
        schema: ``Config``, or a verb's own with further settings.

    Raises:
        ValueError: one line, for an override that cannot be read, an unknown key or config, or a wrong type.
    """
    register(schema)
    # Hydra reads its arguments there, and takes options only before overrides.
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    options = [argument for argument in arguments if argument not in overrides]
    sys.argv = [f"moba-train {config_name}", *options, *overrides]
    # Without this Hydra prints several lines of its own for each fault and ends the process.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    faults: list[ValueError] = []

    def guarded(composed: DictConfig) -> object:
        try:
            return job(composed)
        except ValueError as error:  # Hydra would print a line of its own before ours
            faults.append(error)
            return None

    try:
        hydra.main(version_base="1.3", config_path=str(embedded.folder("configs")), config_name=config_name)(guarded)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_one_line(error)) from None
    except (AssertionError, AttributeError) as error:
        # OmegaConf's way to say that an override reaches into an unset group of a list's entry.
        if "NoneType" not in str(error):
            raise
        raise ValueError("an override names a group that its stage does not have: give it in a recipe file") from None
    if faults:
        raise faults[0]


def register(schema: type[Config] = Config) -> None:
    """The schema ``base_config`` and the resolvers that the recipes use."""
    ConfigStore.instance().store(name="base_config", node=schema)
    OmegaConf.register_new_resolver("embedded", lambda path: str(embedded.folder("data") / path), replace=True)
    OmegaConf.register_new_resolver("sweep_name", _sweep_name, replace=True)


def _sweep_name(number: int, overrides: str) -> str:
    safe = re.sub(r"[^A-Za-z0-9._=,+-]", "-", overrides)
    return f"{number}_{safe}"[:_LONGEST_NAME] if safe else str(number)


def _one_line(error: Exception) -> str:
    """What, which value and the fix, of Hydra's several lines and those of the fault behind them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = [line.strip() for line in str(error.__cause__ or "").splitlines()]
    if unknown := re.match(r"Could not override '(.+)'", lines[0]):
        return f"{unknown[1]}: {_fault(cause) or 'no such key'}; `moba-train train --cfg job` prints every key"
    if "Available options in" in str(error):
        named = next(i for i, line in enumerate(lines) if line.startswith("Available options in"))
        options = [line for line in lines[named + 1 : _end_of_options(lines)] if not line.startswith("_")]
        return f"{lines[0]}: choose from {', '.join(options)}"
    text = ": ".join(part for part in (lines[0], _fault(cause)) if part)
    return f"{text}: give key=value" if isinstance(error, OverrideParseException) else text


def _end_of_options(lines: list[str]) -> int:
    return next((i for i, line in enumerate(lines) if line.startswith("Config search path")), len(lines))


def _fault(lines: list[str]) -> str:
    """The first line of OmegaConf's message, with the key it is about where the line does not say."""
    if not lines or not lines[0]:
        return ""
    keys = [line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")]
    where = "" if not keys or keys[0].split(".")[-1] in lines[0] else f" ({keys[0]})"
    return lines[0] + where
