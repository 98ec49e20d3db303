"""Token stores on disk: what a writer refuses, and what an opened one does."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from moba_train.data.store import StoreWriter, TokenStore
from small_stores import config, jsonl, prepared, some_texts


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    """In two bytes 65,536 would become 0, silently."""
    writer = StoreWriter(tmp_path / "store", vocab_size=1 << 16, shard_bytes=100)
    with pytest.raises(ValueError, match="token id 65536 in a vocabulary of 65536; fix the tokenizer that made it"):
        writer.add([np.array([3, 1 << 16], np.uint32)], source=0)


def test_big_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store", vocab_size=(1 << 16) + 1, shard_bytes=100)
    writer.add([np.array([1 << 16, 7], np.uint32), np.empty(0, np.uint32)], source=3)
    writer.close_shard({})
    writer.finish({"eos_id": 0})
    store = TokenStore.open(tmp_path / "store")
    assert (store.manifest["dtype"], store.document(0).tolist(), store.manifest["max_id"]) == ("<u4", [65536, 7], 65536)


def test_unfinished_or_damaged_stores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no manifest\.json: no token store, or an unfinished one"):
        TokenStore.open(tmp_path)
    store = prepared(config(tmp_path, jsonl(tmp_path / "a.jsonl", some_texts(10))))
    shard = store.path / "00000.tokens"
    whole = bytearray(shard.read_bytes())
    whole[100] ^= 1
    shard.write_bytes(whole)
    with pytest.raises(ValueError, match=r"00000\.tokens: sha256 .* prepare it again"):
        TokenStore.open(store.path).verify()
    os.truncate(shard, 100)
    with pytest.raises(ValueError, match=r"00000\.tokens has 100 bytes, not \d+; delete"):
        TokenStore.open(store.path)
    shard.unlink()
    with pytest.raises(ValueError, match=r"00000\.tokens has 0 bytes"):
        TokenStore.open(store.path)
    shard.write_bytes(whole)
    table = store.path / "00000.documents.npy"
    documents = np.load(table)
    for damage in (lambda: os.truncate(table, 90), table.unlink):
        damage()
        with pytest.raises(
            ValueError, match=r"00000\.documents\.npy cannot be read \(.*\); delete .* prepare it again"
        ):
            TokenStore.open(store.path)
    longer = np.array(documents)
    longer[3, 0] += 10**12
    for table_now in (longer, documents[:-1]):
        np.save(table, table_now)
        with pytest.raises(ValueError, match=r"document lengths in .* are damaged; delete .* prepare it again"):
            TokenStore.open(store.path)
    manifest = store.path / "manifest.json"
    whole_manifest = manifest.read_text()
    for damage, problem in (("[]", "no JSON object"), ("{}", "no format, no vocab_size, "), ('{"form', "Unterminated")):
        manifest.write_text(damage)
        with pytest.raises(ValueError, match=rf"manifest\.json is damaged \({problem}.*\); delete .* prepare it again"):
            TokenStore.open(store.path)
    manifest.write_text(whole_manifest)
    manifest.write_text(manifest.read_text().replace('"format": 3', '"format": 9'))
    with pytest.raises(ValueError, match="store format 9, not 3; prepare the data again"):
        TokenStore.open(store.path)
    manifest.write_text("{")
    with pytest.raises(
        ValueError, match=r"manifest\.json is damaged \(Expecting .*\); delete \S+ and prepare it again"
    ):
        TokenStore.open(store.path)


def test_a_damaged_record_of_an_interrupted_writer_is_named(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store", vocab_size=10, shard_bytes=1)
    writer.add([np.array([3], np.uint16)], source=0)
    writer.close_shard({})
    (tmp_path / "store/00000.json").write_text("")
    with pytest.raises(ValueError, match=r"00000\.json is damaged \(.*\); delete \S+store and prepare it again"):
        StoreWriter(tmp_path / "store", vocab_size=10, shard_bytes=1)
