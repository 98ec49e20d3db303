"""What Hydra, its argument parser and OmegaConf refuse, in one line: what, which value and the fix."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr
from difflib import get_close_matches

from hydra._internal.utils import get_args_parser
from hydra.errors import OverrideParseException
from yaml import MarkedYAMLError

from moba_train.resolved import nearest_key, written_out


def check_options(arguments: list[str]) -> None:
    """``arguments`` are those that are no settings.

    Raises:
        ValueError: an option that Hydra does not have, a value that it does not take, or a word that is neither an
            option nor a setting. By itself Hydra would print its own usage, of a page, and end the process.
    """
    parser = get_args_parser()
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            known, unknown = parser.parse_known_args(arguments)
    except SystemExit:
        raise ValueError(said.getvalue().strip().splitlines()[-1].partition("error: ")[2]) from None
    if words := [*known.overrides, *(each for each in unknown if each[:1] != "-")]:
        raise ValueError(f"{words[0]!r} is not key=value; `moba-train train --cfg job` prints every key")
    if unknown:
        nearest = get_close_matches(unknown[0], re.findall(r"--[a-z-]+", parser.format_usage()), 1)
        meant = f"did you mean {nearest[0]}? " if nearest else ""
        raise ValueError(f"{unknown[0]} is no option; {meant}`moba-train train --hydra-help` lists them")


def one_line(error: Exception) -> str:
    """What, which value and the fix, of Hydra's several lines and those of the fault behind them."""
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be read: close its brackets and quotes, and give a value with spaces or signs "
            f"quotes of its own, as in \"run.dir='a b'\""
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = [line.strip() for line in str(error.__cause__ or "").splitlines()]
    if (unknown := re.match(r"Could not override '(.+)'", lines[0])) and "is not in struct" in "".join(cause[:1]):
        return f"{unknown[1]}: {cause[0]}; a leading + adds it: +{unknown[1]}=…"
    if unknown:
        fault = _fault(cause) or "no such key"
        meant = nearest_key(fault, unknown[1])
        if not meant.startswith("choose"):
            meant = f"{meant} `moba-train train --cfg job` prints every key".lstrip()
        return f"{unknown[1]}: {fault}; {meant}"
    if composing := re.match(r"In '(.+)': \w+ raised while composing config", lines[0]):
        return f"In {composing[1]!r}: {_in_recipe(lines[1:])}"
    if lines[0].startswith("Ambiguous value"):
        return f"{lines[0]}: add --multirun to sweep over the values, or write [a,b] for a list"
    if "Available options in" in str(error):
        named = next(i for i, line in enumerate(lines) if line.startswith("Available options in"))
        options = [line for line in lines[named + 1 : _end_of_options(lines)] if not line.startswith("_")]
        return f"{lines[0]}: choose from {', '.join(options)}"
    text = ": ".join(part for part in (lines[0], _fault(cause, lines[0])) if part)
    return "; ".join(part for part in (text, written_out(text)) if part)


def _in_recipe(lines: list[str]) -> str:
    """What is wrong in a recipe, of OmegaConf's lines."""
    if lines[0] == "Key 'experiment' not in 'Config'":
        return "what it sets would lie under `experiment`: make `# @package _global_` its first line"
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    return "; ".join(part for part in (_fault(lines), nearest_key(lines[0], key), written_out(lines[0])) if part)


def yaml_line(error: MarkedYAMLError) -> str:
    """Where a file is no YAML, and why."""
    mark = error.problem_mark
    where = f"{mark.name}, line {mark.line + 1}" if mark else "a recipe"
    return f"{where} is no YAML ({error.problem}): close its brackets and quotes, and indent with spaces"


def _end_of_options(lines: list[str]) -> int:
    return next((i for i, line in enumerate(lines) if line.startswith("Config search path")), len(lines))


def _fault(lines: list[str], said: str = "") -> str:
    """The first line of OmegaConf's message, with the key it is about where neither that nor what is ``said`` before
    names it."""
    if not lines or not lines[0]:
        return ""
    keys = [line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")]
    where = "" if not keys or keys[0].split(".")[-1] in lines[0] or keys[0] in said else f" ({keys[0]})"
    return lines[0] + where
