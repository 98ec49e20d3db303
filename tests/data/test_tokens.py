"""The folder of a data set's stores: whole or refused, killed at any point or made by two processes at once."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moba_train.config import DataConfig, SourceConfig, SourceFormat
from moba_train.data.documents import find_files
from moba_train.data.store import TokenStore
from moba_train.data.tokenizer import load_tokenizer
from moba_train.data.tokens import prepare_store
from small_stores import DATA, TOKENIZER, config, jsonl, prepared, some_texts

CHILD = """
import os, signal, sys
from moba_train.config import DataConfig, SourceConfig, SourceFormat
from moba_train.data import build, encode, tokens
build.SHARD_BYTES = 4000
source, store, tokenizer, calls_left = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
def counted(call):
    def wrapper(*arguments):
        global calls_left
        calls_left -= 1
        if calls_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)
    return wrapper
os.fsync, os.replace = counted(os.fsync), counted(os.replace)
source = SourceConfig(name="a", format=SourceFormat.jsonl, path=source)
data = DataConfig(name="some", train=[source], store_dir=store, heldout_fraction=0.2)
tokens.prepare_store(data, tokenizer, progress=False)
"""


def child(source: str, store: Path, kill_at: int = 0) -> subprocess.Popen[bytes]:
    """A process that prepares the store and kills itself at its ``kill_at``-th flush or rename."""
    return subprocess.Popen([sys.executable, "-c", CHILD, source, str(store), TOKENIZER, str(kill_at)])


def content(store_dir: Path) -> dict[str, bytes]:
    (folder,) = store_dir.glob("some-*")
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_killed_at_ten_points_gives_the_same_store(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", some_texts(100)).path
    assert child(source, tmp_path / "whole").wait() == 0
    points = random.Random(1).sample(range(1, 21), 10)
    for point in points:
        assert child(source, tmp_path / "killed", point).wait() == -signal.SIGKILL
        (folder,) = (tmp_path / "killed").glob("some-*")
        with pytest.raises(ValueError, match="unfinished"):
            TokenStore.open(folder / "train")
    assert child(source, tmp_path / "killed").wait() == 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_two_processes_at_once(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", some_texts(100)).path
    both = [child(source, tmp_path / "both") for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    (folder,) = (tmp_path / "both").glob("some-*")
    for split in ("train", "heldout"):
        TokenStore.open(folder / split).verify()


def test_bad_input_leaves_no_store(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["", "", "two words"])
    with pytest.raises(ValueError, match=r"data\.train names no source"):
        prepare_store(config(tmp_path), TOKENIZER)
    nothing = SourceConfig(name="n", path=str(tmp_path / "a.jsonl"), format=SourceFormat.jsonl, max_tokens=0)
    with pytest.raises(ValueError, match="source 'n' has max_tokens=0: give it at least 1"):
        prepare_store(config(tmp_path, nothing), TOKENIZER)
    with pytest.raises(ValueError, match=r"data\.heldout_fraction is 1\.0"):
        prepare_store(config(tmp_path, source, heldout_fraction=1.0), TOKENIZER)
    nothing_left = r"the train split holds no document: sources '\w+' gave {}"
    with pytest.raises(ValueError, match=nothing_left.format(r"3 records \(2 empty, 1 too short\); name data.train")):
        prepare_store(config(tmp_path, source, min_document_tokens=99), TOKENIZER, progress=False)
    words = jsonl(tmp_path / "words.jsonl", ["two words", "and three words"])
    with pytest.raises(ValueError, match=nothing_left.format(r"2 .*; lower data\.min_document_tokens=99")):
        prepare_store(config(tmp_path, words, min_document_tokens=99), TOKENIZER, progress=False)
    with pytest.raises(ValueError, match=nothing_left.format(r"2 .*2 also held out\); hold out other documents")):
        prepare_store(config(tmp_path, words, heldout=[words]), TOKENIZER, progress=False)
    with pytest.raises(ValueError, match=nothing_left.format(r"2 .*2 other split\); lower data\.heldout_fraction")):
        prepare_store(config(tmp_path, words, heldout_fraction=0.999), TOKENIZER, progress=False)
    (tmp_path / "empty.txt").write_text("")
    held = jsonl(tmp_path / "held.jsonl", ["held out"])
    with pytest.raises(ValueError, match=r"the train split holds no document: sources 'e' gave 1 records \(1 empty\)"):
        empty = SourceConfig(name="e", path=str(tmp_path / "empty.txt"))
        prepare_store(config(tmp_path, empty, heldout=[held]), TOKENIZER, progress=False)
    with pytest.raises(ValueError, match="the heldout split holds no document"):
        prepare_store(config(tmp_path, source, heldout_fraction=1e-9), TOKENIZER, progress=False)
    assert not list((tmp_path / "store").glob("some-*"))  # not even a held-out store beside an empty one
    (tmp_path / "file").write_text("")
    data = config(tmp_path, source)
    data.store_dir = str(tmp_path / "file" / "store")
    with pytest.raises(ValueError, match=r"data\.store_dir '.*' cannot be written: Not a directory"):
        prepare_store(data, TOKENIZER)
    with pytest.raises(ValueError, match=r"tokenizer 'missing\.json' does not exist"):
        prepare_store(config(tmp_path, source), "missing.json")


def test_the_embedded_books(tmp_path: Path) -> None:
    train, heldout = (SourceConfig(name=split, path=str(DATA / "books" / split)) for split in ("train", "heldout"))
    assert len(find_files(train)) == 16
    store = prepared(DataConfig(name="books", train=[heldout], store_dir=str(tmp_path)))
    assert (len(store), store.tokens) == (2, 297_836)
    text = load_tokenizer(TOKENIZER).decode(store.document(0))
    assert text.startswith("[Sense and Sensibility by Jane Austen 1811]\n\nCHAPTER 1\n\n\nThe family of Dashwood")
    assert text.endswith("\n<|endoftext|>") and "\r" not in text
