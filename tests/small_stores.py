"""Small token stores, and the texts they are made of, for the tests of data."""

from __future__ import annotations

import json
import random
from pathlib import Path

from moba_train import embedded
from moba_train.config import DataConfig, SourceConfig, SourceFormat
from moba_train.data.store import TokenStore
from moba_train.data.tokens import prepare_store

DATA = embedded.folder("data")
TOKENIZER = str(DATA / "tokenizer" / "tokenizer.json")
SMOLLM2 = str(DATA / "smollm2" / "tokenizer.json.xz")
WORDS = ["call", "me", "ishmael", "it's", "1851", "whenever", "damp", "drizzly", "November", "in", "my", "soul", "\n\n"]


def some_texts(count: int, seed: int = 0, longest: int = 400) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]


def jsonl(path: Path, texts: list[str]) -> SourceConfig:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceConfig(name=path.stem, format=SourceFormat.jsonl, path=str(path))


def config(tmp_path: Path, *train: SourceConfig, **more: object) -> DataConfig:
    return DataConfig(name="some", train=list(train), store_dir=str(tmp_path / "store"), **more)  # type: ignore[arg-type]


def prepared(data: DataConfig, split: str = "train", tokenizer: str = TOKENIZER) -> TokenStore:
    store = TokenStore.open(prepare_store(data, tokenizer, progress=False) / split)
    store.verify()
    return store


def documents(store: TokenStore) -> list[list[int]]:
    return [store.document(i).tolist() for i in range(len(store))]
