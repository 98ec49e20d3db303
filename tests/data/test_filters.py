"""What a store leaves out: repeated texts, within a source and across them and the held-out ones, and evaluations'."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moba_train.config import DataConfig, SourceConfig
from moba_train.data import build, encode, filters, split
from moba_train.data.filters import Overlap, SeenTexts, digest
from moba_train.data.store import StoreWriter, TokenStore
from moba_train.data.tokens import prepare_store
from small_stores import TOKENIZER, jsonl


def prepare(tmp_path: Path, train: list[SourceConfig], **more: object) -> tuple[TokenStore, dict[str, dict[str, int]]]:
    """The training store, and its counters by source."""
    data = DataConfig(name="some", train=train, store_dir=str(tmp_path / "store"), **more)  # type: ignore[arg-type]
    store = TokenStore.open(prepare_store(data, TOKENIZER, progress=False) / "train")
    store.verify()
    return store, {source["name"]: source for source in store.manifest["sources"]}


def test_repeated_texts_are_kept_once(tmp_path: Path) -> None:
    first = jsonl(tmp_path / "a.jsonl", ["one", "two", "one", "one ", "held"])
    second = jsonl(tmp_path / "b.jsonl", ["three", "two", "two", ""])
    heldout = jsonl(tmp_path / "h.jsonl", ["held", "another", "held"])
    store, counts = prepare(tmp_path, [first, second], heldout=[heldout])
    assert len(store) == len(set(store.digests().tolist())) == 4
    assert [counts["a"][key] for key in ("documents", "duplicate", "in_heldout")] == [3, 1, 1]
    assert [counts["b"][key] for key in ("documents", "duplicate", "empty")] == [1, 2, 1]
    kept, _ = prepare(tmp_path, [first, second], heldout=[heldout], drop_duplicates=False)
    assert len(kept) == 8
    (held,) = TokenStore.open(store.path.parent / "heldout").manifest["sources"]
    assert (held["documents"], held["duplicate"]) == (2, 1)


def test_an_interruption_changes_no_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SHARD_BYTES", 300)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 200)
    texts = [f"text number {i % 70} of many" for i in range(200)] + ["short"] * 9
    source = jsonl(tmp_path / "a.jsonl", texts)
    whole, counts = prepare(tmp_path / "whole", [source], min_document_tokens=3)
    assert counts["a"]["duplicate"] == 130
    add = StoreWriter.add

    def fails(self: StoreWriter, parts: list[np.ndarray], source: int, digest: int) -> bool:
        if len(self.shards) == 3:
            raise KeyboardInterrupt
        return add(self, parts, source, digest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StoreWriter, "add", fails)
        prepare(tmp_path / "again", [source], min_document_tokens=3)
    again, counts_again = prepare(tmp_path / "again", [source], min_document_tokens=3)
    assert again.manifest["sha256"] == whole.manifest["sha256"]
    assert counts_again == counts


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40), st.lists(st.integers(-5, 5), max_size=40))
def test_seen_texts(stored: list[int], added: list[int]) -> None:
    recent, filters._RECENT = filters._RECENT, 4  # merged often
    try:
        seen, plain = SeenTexts(np.array(stored, np.int64)), set(stored)
        for value in added:
            assert (value in seen) == (value in plain)
            seen.add(value)
            plain.add(value)
        assert all(value in seen for value in plain)
    finally:
        filters._RECENT = recent


def test_digests_are_of_the_text() -> None:
    assert digest("a") == digest("a") != digest("a ")
    assert -(2**63) <= digest("é") < 2**63


words = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=25)


@settings(max_examples=300, deadline=None)
@given(st.lists(words, min_size=1, max_size=3), words, st.integers(1, 5))
def test_overlap_is_a_shared_run_of_words(evaluations: list[list[str]], text: list[str], count: int) -> None:
    def runs(of: list[str]) -> set[tuple[str, ...]]:
        return {tuple(of[i : i + count]) for i in range(len(of) - count + 1)}

    known = set().union(*map(runs, evaluations))
    if not known:
        with pytest.raises(ValueError, match=rf"holds no text of data\.exclude_words={count} words"):
            Overlap([" ".join(one) for one in evaluations], count)
        return
    overlap = Overlap([" ".join(one) for one in evaluations], count)
    assert overlap.found_in(" ".join(text)) == bool(known & runs(text))


def test_overlap_ignores_case_and_punctuation() -> None:
    overlap = Overlap(["What is the capital of France? Paris."], 6)
    assert overlap.found_in("Someone asked: 'what is  THE capital,\nof france!'")
    assert not overlap.found_in("What is the capital of Spain? Of France, Paris.")
    assert not overlap.found_in("")


def test_documents_that_overlap_an_evaluation_are_dropped(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", ["clean words all of them", "so: the Answer, is forty two.", "the answer is"])
    exclude = jsonl(tmp_path / "e.jsonl", ["The answer is forty-two", "too short"])
    store, counts = prepare(tmp_path, [train], exclude=[exclude], exclude_words=5)
    assert (len(store), counts["a"]["overlapping"]) == (2, 1)
    assert store.manifest["exclude_words"] == 5
    with pytest.raises(ValueError, match=r"data\.exclude_words=0: must be at least 1"):
        prepare(tmp_path, [train], exclude=[exclude], exclude_words=0)


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["one", "two"])

    def keeps(text: str) -> int:
        (tmp_path / "a.jsonl").write_text("longer than it was before, while it is being read")
        return digest(text)

    monkeypatch.setattr(split, "digest", keeps)
    with pytest.raises(ValueError, match="source 'a' changed while it was read; prepare it again"):
        prepare(tmp_path, [source])
