"""MDS shards: what mosaicml-streaming writes, compressed or not, and every kind of damage with its outcome."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mds_shards import COLUMNS, describe, packed, write, write_shard
from moba_train import embedded
from moba_train.config import DataConfig, SourceConfig, SourceFormat
from moba_train.data import build
from moba_train.data.documents import find_files, read_records
from moba_train.data.formats import Record
from moba_train.data.store import TokenStore
from moba_train.data.tokenizer import load_tokenizer
from moba_train.data.tokens import prepare_store

TOKENIZER = str(embedded.folder("data") / "tokenizer" / "tokenizer.json")
SMOLLM2 = str(embedded.folder("data") / "smollm2" / "tokenizer.json.xz")
# Two samples that MDSWriter of mosaicml-streaming 0.13.0 wrote with COLUMNS, as ProLong's data on the hub have them.
WRITTEN = base64.b64decode(
    "AgAAABoBAABLAQAAiwEAAHsiY29sdW1uX2VuY29kaW5ncyI6IFsic3RyIiwgIm5kYXJyYXk6dWludDMyIiwgIm5kYXJyYXk6dWludDMyIiwgInVpbnQ2"
    "NCJdLCAiY29sdW1uX25hbWVzIjogWyJkb21haW4iLCAiaW5kaWNlcyIsICJpbnB1dF9pZHMiLCAibGVuZ3RoIl0sICJjb2x1bW5fc2l6ZXMiOiBbbnVs"
    "bCwgbnVsbCwgbnVsbCwgOF0sICJjb21wcmVzc2lvbiI6IG51bGwsICJmb3JtYXQiOiAibWRzIiwgImhhc2hlcyI6IFtdLCAic2l6ZV9saW1pdCI6IDY3"
    "MTA4ODY0LCAidmVyc2lvbiI6IDJ9BAAAAAsAAAAOAAAAYm9vawgBAgAAAAADAAAABAMA9AEACQAAAKCGAQADAAAAAAAAAAMAAAATAAAAFgAAAHdlYggC"
    "AgAAAAACAAAAAgAAAAUAAAAEBQcAAAAIAAAABAAAAAUAAAAGAAAABQAAAAAAAAA="
)


def source(path: Path, **more: object) -> SourceConfig:
    fields: dict[str, Any] = {"token_field": "input_ids", "span_field": "indices", "tokenizer": TOKENIZER} | more
    return SourceConfig(name="mine", format=SourceFormat.mds, path=str(path), **fields)


def records(config: SourceConfig) -> list[Record]:
    return list(read_records(config, find_files(config)))


def ids(config: SourceConfig) -> list[list[int]]:
    return [record.tokens.tolist() for record in records(config) if record.tokens is not None]


def test_what_mosaicml_streaming_writes(tmp_path: Path) -> None:
    (tmp_path / "shard.00000.mds").write_bytes(WRITTEN)
    (tmp_path / "index.json").write_text(json.dumps({"shards": [describe("shard.00000.mds", WRITTEN, COLUMNS)]}))
    assert ids(source(tmp_path)) == [[128000, 9, 100000], [7, 8], [4, 5, 6]]
    assert ids(source(tmp_path, span_field=None)) == [[128000, 9, 100000], [7, 8, 4, 5, 6]]
    samples = [packed([128000, 9, 100000]), packed([7, 8], [4, 5, 6]) | {"domain": "web"}]
    rewritten = write_shard(COLUMNS, samples)
    assert rewritten[-100:] == WRITTEN[-100:]  # so the tests below write as it does


documents = st.lists(st.lists(st.integers(0, 4095), min_size=1, max_size=300), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(st.lists(documents, min_size=1, max_size=4), st.booleans())
def test_every_document_of_every_shard(
    tmp_path_factory: pytest.TempPathFactory, samples: list[list[list[int]]], zstd: bool
) -> None:
    """Compressed or not, in sub-folders with an index each and one over all; and from any record on."""
    path = tmp_path_factory.mktemp("mds")
    shards = {f"proc{i:02}/shard.00000.mds": [packed(*sample)] for i, sample in enumerate(samples)}
    write(path, COLUMNS, shards, zstd)
    for name, of_shard in shards.items():
        write((path / name).parent, COLUMNS, {"shard.00000.mds": of_shard}, zstd)
    config = source(path)
    assert ids(config) == [document for sample in samples for document in sample]
    files, everything = find_files(config), records(config)
    for at, record in enumerate(everything):
        rest = list(read_records(config, files, record.file, record.row))
        assert [(one.file, one.row) for one in rest] == [(one.file, one.row) for one in everything[at:]]


def test_texts_and_other_arrays(tmp_path: Path) -> None:
    columns = {"text": "str", "free": "ndarray", "fixed": "ndarray:int32:4", "other": "bytes"}
    one = {"text": "naïve", "free": np.arange(300, dtype=np.uint16), "fixed": np.arange(4, dtype=np.int32)}
    write(tmp_path, columns, {"a.mds": [one | {"other": b"\xff"}, one | {"text": "", "other": b""}]})
    plain = source(tmp_path, token_field=None, span_field=None)
    assert [record.text for record in records(plain)] == ["naïve", ""]
    assert ids(source(tmp_path, token_field="free", span_field=None)) == [list(range(300))] * 2
    assert ids(source(tmp_path, token_field="fixed", span_field=None)) == [[0, 1, 2, 3]] * 2
    with pytest.raises(ValueError, match=r"has no field 'input_ids' but 'text', .*; set the source's token_field"):
        records(source(tmp_path))
    (bad, _) = records(source(tmp_path, token_field="text", span_field=None))
    assert bad.text is None and "no row of token ids" in bad.problem
    (bad, _) = records(source(tmp_path, token_field="other", span_field=None))
    assert bad.text is None and "the encoding bytes is neither str nor ndarray" in bad.problem


@pytest.mark.parametrize(
    ("sample", "problem"),
    [
        (packed([1, 2]) | {"indices": np.array([[0, 3]], np.uint32)}, "reaches past the 2 tokens"),
        (packed([1, 2]) | {"indices": np.array([[2, 1]], np.uint32)}, "reaches past the 2 tokens"),
        (packed([1, 2]) | {"indices": np.array([0, 1, 2], np.uint32)}, "cannot reshape"),
        (packed([1, 2]) | {"input_ids": np.zeros((2, 2), np.uint32)}, "no row of token ids"),
    ],
    ids=["past", "reversed", "odd", "square"],
)
def test_bad_samples_are_dropped_and_counted(tmp_path: Path, sample: dict[str, Any], problem: str) -> None:
    write(tmp_path, COLUMNS, {"a.mds": [packed([5]), sample, packed([6])]})
    good, bad, last = records(source(tmp_path))
    assert bad.text is None and "a.mds sample 1 cannot be decoded" in bad.problem and problem in bad.problem
    assert (good.row, bad.row, last.row) == (0, 1, 2)


@pytest.mark.parametrize("zstd", [False, True])
def test_damage(tmp_path: Path, zstd: bool) -> None:
    write(tmp_path, COLUMNS, {"a.mds": [packed(list(range(500)))]}, zstd)
    shard = next(tmp_path.glob("a.mds*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match=r"a\.mds\S* cannot be read \(.*\); replace it, or leave it out"):
        records(source(tmp_path))
    shard.unlink()
    with pytest.raises(ValueError, match=r"a\.mds\S*, which its index\.json names, is not there; download it"):
        find_files(source(tmp_path))
    index = json.loads((tmp_path / "index.json").read_text())
    for changed in (index | {"shards": [{**index["shards"][0], "version": 1}]}, {}, []):
        (tmp_path / "index.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"index\.json describes no MDS shards of version 2"):
            find_files(source(tmp_path))
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match=r"is no folder with an index\.json in it or below"):
        find_files(source(tmp_path))


def prepared(tmp_path: Path, tokenizer: str, *sources: SourceConfig, **more: Any) -> TokenStore:
    data = DataConfig(name="some", train=list(sources), store_dir=str(tmp_path / "store"), **more)
    store = TokenStore.open(prepare_store(data, tokenizer, progress=False) / "train")
    store.verify()
    return store


def test_a_store_of_token_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are kept as they are: no end-of-text token, duplicates and overlaps dropped as those of texts."""
    monkeypatch.setattr(build, "SHARD_BYTES", 300)
    draw = np.random.default_rng(0)
    texts = [draw.integers(0, 4096, draw.integers(1, 200)).tolist() for _ in range(30)]
    write(tmp_path / "a", COLUMNS, {"a.mds": [packed(*texts[:10]), packed(*texts[10:]), packed(texts[3])]})
    store = prepared(tmp_path, TOKENIZER, source(tmp_path / "a"))
    assert [store.document(i).tolist() for i in range(len(store))] == texts
    (about,) = store.manifest["sources"]
    assert (about["records"], about["duplicate"], about["documents"]) == (31, 1, 30)

    tokenizer = load_tokenizer(TOKENIZER)
    words = "the capital of France is Paris and nothing else"
    write(tmp_path / "b", COLUMNS, {"b.mds": [packed(tokenizer.encode_batch([f"So {words}."])[0].tolist(), texts[0])]})
    (tmp_path / "exclude.txt").write_text(words)
    exclude = [SourceConfig(name="evaluations", path=str(tmp_path / "exclude.txt"))]
    store = prepared(tmp_path, TOKENIZER, source(tmp_path / "b"), exclude=exclude, exclude_words=9)
    assert (store.manifest["sources"][0]["overlapping"], len(store)) == (1, 1)


def test_token_ids_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", COLUMNS, {"a.mds": [packed([1, 2, 3])]})
    with pytest.raises(
        ValueError, match=r"source 'mine' holds token ids of .*, and the model's tokenizer .* gives others"
    ):
        prepared(tmp_path, SMOLLM2, source(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"source 'mine' has token ids \(token_field=input_ids\): set its tokenizer"):
        prepared(tmp_path, TOKENIZER, source(tmp_path / "a", tokenizer=None))
    write(tmp_path / "b", COLUMNS, {"b.mds": [packed([4096])]})
    with pytest.raises(ValueError, match="token id 4096 in a vocabulary of 4096"):
        prepared(tmp_path, TOKENIZER, source(tmp_path / "b"))


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"compression": "br", "zip_data": {"basename": "a.mds"}, "raw_data": {"basename": "b"}}, "br is not read"),
        ({"raw_data": {"basename": "a.mds", "bytes": 9}}, "bytes, not the 9 of index.json"),
        ({"column_sizes": [None, None, None, 4]}, r"its columns have \d+ bytes, the sample \d+"),
    ],
    ids=["compression", "bytes", "columns"],
)
def test_shards_that_are_not_as_described(tmp_path: Path, about: dict[str, Any], message: str) -> None:
    folder = write(tmp_path, COLUMNS, {"a.mds": [packed([1, 2, 3])]})
    shard = describe("a.mds", (folder / "a.mds").read_bytes(), COLUMNS) | about
    (folder / "index.json").write_text(json.dumps({"shards": [shard]}))
    if "column_sizes" in about:  # which a sample alone shows
        (bad,) = records(source(folder))
        assert bad.text is None and re.search(message, bad.problem)
    else:
        with pytest.raises(ValueError, match=rf"a\.mds cannot be read .*{message}"):
            records(source(folder))


def test_token_ids_in_other_formats(tmp_path: Path) -> None:
    rows = [[1, 2, 3], [4], [], [-1], ["a"], None]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    found = records(
        SourceConfig(name="a", format=SourceFormat.jsonl, path=str(tmp_path / "a.jsonl"), token_field="input_ids")
    )
    assert [None if one.tokens is None else one.tokens.tolist() for one in found] == [*rows[:3], None, None, None]
    assert all("'input_ids' holds no row of token ids" in one.problem for one in found[3:])
