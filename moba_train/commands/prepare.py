"""Tokenise a recipe's documents into its token store: moba-train prepare [key=value ...]

Takes the settings of `moba-train train`; those of data and model.tokenizer count. A store that is there already is
left alone; one that was interrupted is completed. Says what was left out, and why.
"""

from __future__ import annotations

from omegaconf import DictConfig

from moba_train import resolved
from moba_train.commands.compose import run_hydra
from moba_train.data.store import TokenStore
from moba_train.data.tally import DROPPED
from moba_train.data.tokens import prepare_store
from moba_train.model import tokenizer_path
from moba_train.validate import validate


def main(arguments: list[str]) -> int:
    run_hydra("train", _job, arguments)
    return 0


def _job(composed: DictConfig) -> None:
    config = resolved.to_config(composed)
    validate(config)
    stores = prepare_store(config.data, tokenizer_path(config.model))
    for split in ("train", "heldout"):
        if not (stores / split).is_dir():
            continue
        store = TokenStore.open(stores / split)
        longest = int(store.lengths.max(initial=0))
        print(f"{split}: {len(store):,} documents, {store.tokens:,} tokens, the longest {longest:,}: {store.path}")
        for source in store.manifest["sources"]:
            dropped = [f"{source[reason]:,} {name}" for reason, name in DROPPED.items() if source[reason]]
            if dropped:
                print(f"  left out of {source['name']}'s {source['records']:,} records: {', '.join(dropped)}")
