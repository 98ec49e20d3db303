"""The ready data configs, as they stand, on small local files of the schemas that the data sets have on the hub."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra import compose, initialize_config_dir

from mds_shards import COLUMNS, packed, write
from moba_train import embedded, hub, resolved
from moba_train.commands.compose import register
from moba_train.config import Config, SourceFormat
from moba_train.data.mix import build_mix
from moba_train.data.store import TokenStore
from moba_train.data.tokenizer import load_tokenizer
from moba_train.data.tokens import prepare_store

TOKENIZER = str(embedded.folder("data") / "tokenizer" / "tokenizer.json")
PUBLIC = sorted(
    path.stem for path in (embedded.folder("configs") / "data").glob("*.yaml") if path.stem not in ("books", "none")
)
CONTEXT = 64
# The columns of each data set besides its text, from its card.
SCHEMAS = {
    "emozilla/pg19": ["short_book_title", "publication_date", "url"],
    "HuggingFaceFW/fineweb-edu": ["id", "dump", "url", "date", "file_path", "language", "score"],
    "HuggingFaceFW/fineweb": ["id", "dump", "url", "date", "file_path", "language"],
    "mlfoundations/dclm-baseline-1.0-parquet": [
        "bff_contained_ngram_count_before_dedupe",
        "language_id_whole_page",
        "url",
    ],
    "wikimedia/wikipedia": ["id", "url", "title"],
    "open-web-math/open-web-math": ["url", "date", "metadata"],
    "hf://datasets/EleutherAI/proof-pile-2/arxiv/train/*.jsonl.zst": ["meta"],
    "hf://datasets/EleutherAI/proof-pile-2/arxiv/validation/*.jsonl.zst": ["meta"],
    "hf://datasets/allenai/dolma3_longmino_mix-50B-1025/**/*.jsonl.zst": ["id", "metadata", "source"],
}
draw = random.Random(0)
serial = itertools.count()


def some_texts(count: int) -> list[str]:
    """No two alike, from a few words to several rows."""
    return [
        f"number {next(serial)} " + " ".join(draw.choices(["sea", "whale", "salt"], k=draw.randint(3, 200)))
        for _ in range(count)
    ]


def load_locally(folder: Path) -> Callable[..., Any]:
    """`datasets.load_dataset` for the data sets above, each from local files made on the spot."""
    load = datasets.load_dataset

    def loaded(
        path: str, name: str | None = None, *, split: str, data_files: dict[str, str] | None = None, **more: Any
    ):
        place = folder / str(next(serial))
        place.mkdir()
        if path == "HuggingFaceCode/stack-v3-train":
            return load_repositories(load, place)
        known = SCHEMAS[data_files[split] if data_files else path]
        rows = [{"text": text} | {column: f"{column} of it" for column in known} for text in some_texts(60)]
        if data_files:
            assert (path, name) == ("json", None)
            file = place / "a.jsonl.zst"
            file.write_bytes(
                pa.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), "zstd", asbytes=True)
            )
            return load("json", data_files={split: str(file)}, split=split, streaming=True)
        pq.write_table(pa.Table.from_pylist(rows), place / f"{split}.parquet")
        files = f"  data_files:\n  - split: {split}\n    path: {split}.parquet\n"
        (place / "README.md").write_text(f"---\nconfigs:\n- config_name: {name or 'default'}\n{files}---\n")
        return load(str(place), name, split=split, streaming=True)

    return loaded


def load_repositories(load: Callable[..., Any], place: Path) -> Any:
    """30 repositories of two files, in rows as The Stack v3 has them."""
    rows = [
        {
            "repo_path": f"owner/{repo}",
            "commit_id": "0",
            "num_files": 2,
            "files": [
                {"content_id": "1", "content": text, "file_path": f"{file}.py", "language": "Python"}
                for file, text in zip("ab", some_texts(2), strict=True)
            ],
        }
        for repo in range(30)
    ]
    pq.write_table(pa.Table.from_pylist(rows), place / "train.parquet")
    return load(str(place), split="train", streaming=True)


def composed(name: str) -> Config:
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(embedded.folder("configs"))):
        return resolved.to_config(compose("train", overrides=[f"data={name}"]))


def write_own_files(folder: Path) -> None:
    """What stack_repositories, code_repositories and texts ask for."""
    (folder / "data/texts").mkdir(parents=True)
    for number, text in enumerate(some_texts(60)):
        (folder / f"data/texts/{number}.txt").write_text(text)
    rows = [
        {"max_stars_repo_name": f"owner/{repo}", "max_stars_repo_path": f"{file}.py", "content": text}
        for repo in range(30)
        for file, text in zip("ab", some_texts(2), strict=True)
    ]
    (folder / "data/fetched/stack").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data/fetched/stack/data_0.parquet")
    for row in rows:
        file = folder / "data/repositories" / row["max_stars_repo_name"].replace("/", "-") / row["max_stars_repo_path"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(row["content"])


def write_prolong(config: Config) -> None:
    """Rows of token ids as ProLong packed them: of one document in the domains of a fixed length, of several in others.

    Its tokenizer is on the hub; the one here stands for it.
    """
    tokenizer = load_tokenizer(TOKENIZER)
    for source in config.data.train:
        if source.format is not SourceFormat.mds:
            continue
        assert source.tokenizer == "princeton-nlp/Llama-3-8B-ProLong-64k-Base"
        source.tokenizer = TOKENIZER
        ids = np.concatenate(tokenizer.encode_batch(some_texts(100))).tolist()
        assert len(ids) > 40 * CONTEXT
        documents = [ids[at : at + CONTEXT] for at in range(0, 40 * CONTEXT, CONTEXT)]
        if not source.path.endswith(("-65536", "-524288")):
            documents = [part for document in documents for part in (document[:23], document[23:])]
        samples = [packed(*documents[at : at + 2]) for at in range(0, len(documents), 2)]
        for part in range(2):
            write(Path(source.path) / f"proc{part:02}-64", COLUMNS, {"shard.00000.mds": samples[part::2]})


@pytest.mark.parametrize("name", PUBLIC)
def test_ready_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_own_files(tmp_path)
    config = composed(name)
    if any(source.path.endswith(".zst") for source in config.data.train):
        pytest.importorskip("zstandard", reason="datasets reads .zst with it")
    monkeypatch.setattr(datasets, "load_dataset", load_locally(tmp_path))
    monkeypatch.setattr(hub, "out_of_reach", lambda name: False)
    write_prolong(config)
    assert config.data.name == name
    if config.data.heldout_fraction:
        config.data.heldout_fraction = 0.2  # of so few documents
    stores = prepare_store(config.data, TOKENIZER, progress=False)
    store, heldout = (TokenStore.open(stores / split) for split in ("train", "heldout"))
    by_source = {source["name"]: source for source in store.manifest["sources"]}
    assert set(by_source) == {source.name for source in config.data.train}
    assert all(source["documents"] >= 15 and not source["bad"] for source in by_source.values())
    assert len(heldout) > 0
    mix = build_mix(store, CONTEXT, 0, config.data.mix)
    if config.data.mix.full_rows is not None:
        assert mix.full_share == pytest.approx(config.data.mix.full_rows, abs=1e-6)
    if name.startswith("prolong") and name != "prolong_text":
        sources = [store.manifest["sources"][index]["name"] for index in store.sources]
        first_documents = mix.rows.documents[mix.rows.offsets[[pool.first for pool in mix.pools]]]
        names = [sources[document] for document in first_documents]  # a pool has documents of one source
        long = [pool for pool, name in zip(mix.pools, names, strict=True) if name.startswith(("code", "books"))]
        assert sum(pool.share for pool in long) == pytest.approx(0.6, abs=0.02)
        assert mix.full_share == pytest.approx(0.6, abs=0.02)  # theirs are rows of one document
    for source in config.data.train:
        if source.group_field or source.files_field or source.format is SourceFormat.repository:
            assert by_source[source.name]["records"] == 30  # repositories, of 60 files


def test_every_config_says_licence_and_place() -> None:
    for name in PUBLIC:
        text = (embedded.folder("configs") / "data" / f"{name}.yaml").read_text()
        assert text.startswith("# ")
        if name not in ("code_repositories", "texts"):
            assert any(word in text for word in ("huggingface.co/datasets", "arXiv:"))
