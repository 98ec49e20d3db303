"""What a store holds of its sources' records, whatever interrupts its making."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from moba_train.config import SourceConfig, SourceFormat
from moba_train.data import build, encode
from moba_train.data.store import StoreWriter
from moba_train.data.tokenizer import load_tokenizer
from moba_train.data.tokens import prepare_store
from small_stores import SMOLLM2, TOKENIZER, config, documents, jsonl, prepared, some_texts


@pytest.mark.parametrize("tokenizer", [TOKENIZER, SMOLLM2], ids=["books", "smollm2"])
def test_a_store_holds_each_document_as_encoded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    """Also where documents are cut into pieces over several batches, and the store into shards."""
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 700)
    monkeypatch.setattr(build, "SHARD_BYTES", 5000)
    first, second = some_texts(30), [*some_texts(20, seed=1), "", "x" * 3000, "é"]
    store = prepared(
        config(tmp_path, jsonl(tmp_path / "a.jsonl", first), jsonl(tmp_path / "b.jsonl", second)), tokenizer=tokenizer
    )
    whole = load_tokenizer(tokenizer).encode_batch([text for text in first + second if text])
    assert documents(store) == [[*ids.tolist(), 0] for ids in whole]
    assert store.lengths.tolist() == [len(ids) + 1 for ids in whole]
    assert store.sources.tolist() == [0] * 30 + [1] * 22
    manifest = store.manifest
    assert len(manifest["shards"]) > 3 and manifest["dtype"] == "<u2"
    assert store.tokens == manifest["tokens"] == store.lengths.sum()
    assert manifest["max_id"] == max(int(ids.max()) for ids in whole) < store.vocab_size
    assert [source["documents"] for source in manifest["sources"]] == [30, 22]
    assert [source["empty"] for source in manifest["sources"]] == [0, 1]
    assert not list(store.path.glob("next.*"))


def test_settings(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["one", "two words and more of them", "three"])
    store = prepared(config(tmp_path, source, append_eos=False, min_document_tokens=4))
    assert documents(store) == [
        ids.tolist() for ids in load_tokenizer(TOKENIZER).encode_batch(["two words and more of them"])
    ]
    assert store.manifest["sources"][0]["short"] == 2
    assert store.eos_id == 0


def test_heldout_sources_and_fraction(tmp_path: Path) -> None:
    texts = some_texts(300, longest=20)
    source = jsonl(tmp_path / "a.jsonl", texts)
    data = config(tmp_path, source, heldout_fraction=0.1)
    train, heldout = prepared(data), prepared(data, "heldout")
    everything = prepared(config(tmp_path, source))
    assert 10 < len(heldout) < 70
    assert sorted(documents(train) + documents(heldout)) == sorted(documents(everything))
    assert not {tuple(ids) for ids in documents(train)} & {tuple(ids) for ids in documents(heldout)}
    assert train.manifest["sources"][0]["other_split"] == len(heldout)

    data.heldout = [jsonl(tmp_path / "b.jsonl", ["named"])]
    assert len(prepared(data)) == len(everything)
    assert len(prepared(data, "heldout")) == 1


def test_no_more_than_max_tokens_of_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The document that reaches the limit is the last; others of the source are neither read nor counted."""
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 500)
    first, second = jsonl(tmp_path / "a.jsonl", some_texts(200, longest=50)), jsonl(tmp_path / "b.jsonl", ["other"])
    whole = prepared(config(tmp_path, first, second))
    first.max_tokens = int(whole.lengths[:20].sum())
    store = prepared(config(tmp_path, first, second))
    assert store.lengths.tolist() == [*whole.lengths[:20], whole.lengths[-1]]
    assert [source["records"] for source in store.manifest["sources"]] == [20, 1]
    heldout = prepared(config(tmp_path, first, second, heldout_fraction=0.2), "heldout")
    assert 0.2 * first.max_tokens <= heldout.tokens < 0.4 * first.max_tokens


def test_bad_records_are_counted_and_too_many_stop(tmp_path: Path) -> None:
    """One of 2,000 is in the manifest; three end the preparation, whose rest goes on once the file is mended."""
    texts = [f"text {number}" for number in range(2000)]
    source = jsonl(tmp_path / "a.jsonl", texts)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{broken\n")
    (about,) = prepared(config(tmp_path, source)).manifest["sources"]
    assert (about["records"], about["bad"], about["documents"]) == (2001, 1, 2000)
    assert about["first_bad"].startswith(f"{tmp_path}/a.jsonl line 2001 is not JSON")
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{broken\n" * 2)
    data = config(tmp_path / "again", source)
    with pytest.raises(ValueError, match=r"3 of 2003 records are bad, above 0\.1%; the first: .*line 2001 is not JSON"):
        prepared(data)
    jsonl(tmp_path / "a.jsonl", texts)
    assert len(prepared(data)) == 2000


def test_a_file_may_have_any_bytes_for_a_name(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / os.fsdecode(b"na\xefve.txt")).write_text("two words")
    data = config(tmp_path, SourceConfig(name="texts", path=str(tmp_path / "texts")))
    assert len(prepared(data)) == 1
    assert len(prepared(data)) == 1  # by its record, which names the file


def test_an_interrupted_source_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was counted before the interruption counts once."""
    monkeypatch.setattr(build, "SHARD_BYTES", 2000)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 500)
    source = jsonl(tmp_path / "a.jsonl", [*some_texts(40), "", "", *some_texts(1500, seed=2, longest=3)])
    whole = prepared(config(tmp_path / "whole", source))
    add = StoreWriter.add

    def fails(self: StoreWriter, parts: list[np.ndarray], source: int, digest: int) -> bool:
        if len(self.shards) == 9:
            raise KeyboardInterrupt
        return add(self, parts, source, digest)

    data = config(tmp_path / "again", source)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StoreWriter, "add", fails)
        prepared(data)
    again = prepared(data)
    assert again.manifest["sha256"] == whole.manifest["sha256"]
    assert again.manifest["sources"] == whole.manifest["sources"]


def test_a_token_id_beyond_the_vocabulary_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text('{"ids": [5, 6]}\n\n{"ids": [7, 4096]}\n')
    ids = SourceConfig(
        name="ids", format=SourceFormat.jsonl, path=str(tmp_path / "ids.jsonl"), token_field="ids", tokenizer=TOKENIZER
    )
    with pytest.raises(
        ValueError, match=r"source 'ids': \S+/ids\.jsonl record 3: token id 4096 in a vocabulary of 4096"
    ):
        prepare_store(config(tmp_path, ids), TOKENIZER, progress=False)
