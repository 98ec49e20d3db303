"""Hydra, for the verbs that take a whole configuration: the only place that composes."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from moba_train import embedded
from moba_train.commands.refusals import check_options, one_line, yaml_line
from moba_train.config import Config
from moba_train.resolved import RESUMABLE
from moba_train.validate import LONGEST_NAME

_SWEPT = "MOBA_TRAIN_SWEPT"
_INDEX = re.compile(r"\[(\d+)\]")
_ENTRY = re.compile(r"^[^=]*\.\d+\.")  # an override of one setting of a list's entry


_sweeps: list[Path] = []  # directories that Hydra has asked for


def run_hydra(
    config_name: str, job: Callable[[DictConfig], object], arguments: list[str], schema: type[Config] = Config
) -> Path | None:
    """Compose ``configs/<config_name>.yaml`` with the overrides and call ``job``, once a point of a sweep.

    With a launcher of Hydra's that starts the points elsewhere, ``job`` is pickled: nothing that it changes in this
    process's memory comes back.

    Args:
        schema: ``Config``, or a verb's own with further settings.

    Returns:
        The directory of a sweep; None for a single run.

    Raises:
        ValueError: one line, for an option or override that cannot be read, an unknown key or config, a wrong type, or
            a recipe that is no YAML.
    """
    register(schema)
    # Hydra reads its arguments there, and takes options only before overrides.
    given = [each for each in arguments if each[:1] == "~" or ("=" in each and each[:1] not in "-=")]
    options = [argument for argument in arguments if argument not in given]
    overrides = [_hydra_key(override) for override in given]
    check_options(options)
    sys.argv = [f"moba-train {config_name}", *options, *overrides]
    # Without this Hydra prints several lines of its own for each fault and ends the process.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    faults: list[ValueError | OSError] = []
    begun: list[DictConfig] = []
    _sweeps.clear()

    def guarded(composed: DictConfig) -> object:
        begun.append(composed)
        try:
            return job(composed)
        except (ValueError, OSError) as error:  # Hydra would print a line of its own before ours
            faults.append(error)
            return None

    with _in_one_line(overrides, begun):
        _note_swept(overrides)
        hydra.main(version_base="1.3", config_path=str(embedded.folder("configs")), config_name=config_name)(guarded)()
    if faults:
        raise faults[0]
    multirun = {"-m", "--multirun"} & set(options)
    return _sweeps[-1] if multirun and _sweeps else None


@contextmanager
def _in_one_line(overrides: list[str], begun: list[DictConfig]) -> Iterator[None]:
    """What composing refuses, as a ValueError of one line. ``begun`` holds something once a job has begun: what goes
    wrong from then on is none of composing's."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(one_line(error)) from None
    except MarkedYAMLError as error:
        raise ValueError(yaml_line(error)) from None
    except (AssertionError, AttributeError) as error:
        # OmegaConf's way to say that an override reaches into an unset group of a list's entry.
        if begun or "NoneType" not in str(error):
            raise
        named = ", ".join(override for override in overrides if _ENTRY.search(override)) or "an override"
        raise ValueError(f"{named}: names a group that is not set there; give it in a recipe file") from None
    except Exception as error:
        if not type(error).__module__.startswith("submitit"):
            raise
        # A job that was cancelled, or that its machine ended: what it said last.
        raise ValueError(f"a point of the sweep did not end: {str(error).strip().splitlines()[-1]}") from None


def register(schema: type[Config] = Config) -> None:
    """The schema ``base_config``."""
    ConfigStore.instance().store(name="base_config", node=schema)


def _sweep_folder(directory: str, name: str | None, unnamed: str) -> str:
    """The directory of a sweep, stable where ``run.name`` names it."""
    folder = f"{directory}/{name or unnamed}"
    _sweeps.append(Path(folder))
    return folder


def _sweep_point(number: int, tasks: ListConfig, name: str | None) -> str:
    """A point's directory: what sets it apart, behind its number; without that in a named sweep, so that a longer one
    finds it again."""
    swept = os.environ.get(_SWEPT, "").split(",")
    kept = [task for task in tasks if _key(task) in swept]
    if not kept:  # a sweeper that takes its points from elsewhere
        kept = [task for task in tasks if not f"{_key(task)}.".startswith(RESUMABLE)]
    overrides = ",".join(kept) or "point"
    safe = re.sub(r"[^A-Za-z0-9._=,+-]", "-", overrides)
    if name is None:
        return f"{number}_{safe}"[:LONGEST_NAME]
    if safe == overrides and len(safe) <= LONGEST_NAME:
        return safe
    return f"{safe[:LONGEST_NAME]}-{sha256(overrides.encode()).hexdigest()[:8]}"


def _note_swept(overrides: list[str]) -> None:
    """Leave the keys that are given several values in the environment, which the points inherit wherever they run."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    os.environ[_SWEPT] = ",".join(override.key_or_group for override in parsed if override.is_sweep_override())
    # A directory that the user names to Hydra itself, in place of ours.
    _sweeps.extend(Path(str(override.value())) for override in parsed if override.key_or_group == "hydra.sweep.dir")


def _hydra_key(override: str) -> str:
    """An entry of a list as our messages name it, ``schedule.stages[0]``, as Hydra reads it: ``schedule.stages.0``."""
    key, equals, value = override.partition("=")  # ~key, which removes it, has neither
    return _INDEX.sub(r".\1", key) + equals + value


def _key(task: str) -> str:
    return task.partition("=")[0].lstrip("+~")


# On import, since a sweep's point may be composed in another process that unpickles its job.
OmegaConf.register_new_resolver("embedded", lambda path: str(embedded.folder("data") / path), replace=True)
OmegaConf.register_new_resolver("sweep_folder", _sweep_folder, replace=True)
OmegaConf.register_new_resolver("sweep_point", _sweep_point, replace=True)
