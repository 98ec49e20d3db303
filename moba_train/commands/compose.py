"""Hydra, for the verbs that take a whole configuration: the only place that composes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from moba_train import embedded
from moba_train.config import Config

_LONGEST_NAME = 120  # of a sweep's run directory; file systems stop at 255 bytes


def run_hydra(config_name: str, job: Callable[[DictConfig], object], arguments: list[str]) -> None:
    """Compose ``configs/<config_name>.yaml`` with the overrides and call ``job``, once a point of a sweep."""
    register()
    sys.argv = [f"moba-train {config_name}", *arguments]  # Hydra reads its overrides there
    hydra.main(version_base="1.3", config_path=str(embedded.folder("configs")), config_name=config_name)(job)()


def register() -> None:
    """The schema ``base_config`` and the resolvers that the recipes use."""
    ConfigStore.instance().store(name="base_config", node=Config)
    OmegaConf.register_new_resolver("embedded", lambda path: str(embedded.folder("data") / path), replace=True)
    OmegaConf.register_new_resolver("sweep_name", _sweep_name, replace=True)


def _sweep_name(number: int, overrides: str) -> str:
    safe = re.sub(r"[^A-Za-z0-9._=,+-]", "-", overrides)
    return f"{number}_{safe}"[:_LONGEST_NAME] if safe else str(number)
