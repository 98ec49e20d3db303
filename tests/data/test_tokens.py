"""Token stores: what they hold, that they are made once, and that no interruption changes them."""

from __future__ import annotations

import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moba_train import embedded
from moba_train.config import DataConfig, SourceConfig, SourceFormat
from moba_train.data import build, encode
from moba_train.data.documents import find_files
from moba_train.data.store import StoreWriter, TokenStore
from moba_train.data.tokenizer import load_tokenizer
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


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    """In two bytes 65,536 would become 0, silently."""
    writer = StoreWriter(tmp_path / "store", vocab_size=1 << 16, shard_bytes=100)
    with pytest.raises(ValueError, match="token id 65536 in a vocabulary of 65536; fix the tokenizer"):
        writer.add([np.array([3, 1 << 16], np.uint32)], source=0)


def test_big_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "store", vocab_size=(1 << 16) + 1, shard_bytes=100)
    writer.add([np.array([1 << 16, 7], np.uint32), np.empty(0, np.uint32)], source=3)
    writer.close_shard({})
    writer.finish({"eos_id": 0})
    store = TokenStore.open(tmp_path / "store")
    assert (store.manifest["dtype"], store.document(0).tolist(), store.manifest["max_id"]) == ("<u4", [65536, 7], 65536)


def files_of(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_made_once_for_the_same_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Other settings and tokenizers lie beside it."""
    source = jsonl(tmp_path / "a.jsonl", some_texts(10))
    data = config(tmp_path, source)
    folder = prepare_store(data, TOKENIZER, progress=False)
    made = files_of(folder)
    assert prepare_store(data, TOKENIZER, progress=False) == folder
    assert files_of(folder) == made

    folders = {folder, prepare_store(data, SMOLLM2, progress=False)}
    data.min_document_tokens = 3
    caplog.set_level("INFO", "moba_train.data.tokens")
    folders.add(prepare_store(data, TOKENIZER, progress=False))
    assert "min_document_tokens 1 -> 3" in caplog.text
    data.train.append(jsonl(tmp_path / "b.jsonl", ["more"]))
    folders.add(prepare_store(data, TOKENIZER, progress=False))
    assert "train source 'b' is new" in caplog.text
    assert len(folders) == 4


def test_a_touched_copied_or_absent_source_is_the_same(tmp_path: Path) -> None:
    """What a file holds counts, and nothing else: a fresh clone, a new time, no documents at all."""
    source = jsonl(tmp_path / "a.jsonl", some_texts(10))
    data = config(tmp_path, source)
    folder = prepare_store(data, TOKENIZER, progress=False)
    os.utime(source.path, ns=(1, 1))
    assert prepare_store(data, TOKENIZER, progress=False) == folder
    assert json.loads((folder / "inputs.json").read_text())["files"]["train"][0][0][2] == 1  # not to be read again
    os.unlink(source.path)
    assert prepare_store(data, TOKENIZER, progress=False) == folder
    (folder / "train" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"a\.jsonl' does not exist"):  # unfinished, they are needed
        prepare_store(data, TOKENIZER, progress=False)


def test_a_changed_source_is_refused_or_rebuilt_when_asked(tmp_path: Path) -> None:
    texts = some_texts(10)
    source = jsonl(tmp_path / "a.jsonl", texts)
    evaluation = jsonl(tmp_path / "e.jsonl", ["one two three four five"])
    data = config(tmp_path, source, exclude=[evaluation], exclude_words=5)
    folder = prepare_store(data, TOKENIZER, progress=False)
    made = files_of(folder)
    jsonl(tmp_path / "a.jsonl", [texts[0][::-1], *texts[1:]])  # of the same size
    refused = r"was made of something else: train source 'a': a\.jsonl is changed\. Set data\.rebuild=true to make it"
    with pytest.raises(ValueError, match=refused):
        prepare_store(data, TOKENIZER, progress=False)
    assert files_of(folder) == made
    jsonl(tmp_path / "e.jsonl", ["six words that are not there"])
    with pytest.raises(ValueError, match=r"a\.jsonl is changed; exclude source 'e': e\.jsonl is changed"):
        prepare_store(data, TOKENIZER, progress=False)
    before = TokenStore.open(folder / "train").manifest["sha256"]
    data.rebuild = True
    assert prepare_store(data, TOKENIZER, progress=False) == folder
    assert TokenStore.open(folder / "train").manifest["sha256"] != before
    made = files_of(folder)
    prepare_store(data, TOKENIZER, progress=False)
    assert files_of(folder) == made  # asked for again, nothing has changed


def test_new_and_missing_files_are_told(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{name}.txt").write_text(name * 9)
    data = config(tmp_path, SourceConfig(name="texts", path=str(tmp_path / "texts")))
    prepare_store(data, TOKENIZER, progress=False)
    os.unlink(tmp_path / "texts" / "b.txt")
    for name in "de":
        (tmp_path / "texts" / f"{name}.txt").write_text(name * 9)
    with pytest.raises(ValueError, match=r"2 files are new, d\.txt among them"):
        prepare_store(data, TOKENIZER, progress=False)
    with pytest.raises(ValueError, match=r"b\.txt is gone"):
        prepare_store(data, TOKENIZER, progress=False)


def test_another_version_of_the_code_is_refused_or_rebuilt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = config(tmp_path, jsonl(tmp_path / "a.jsonl", some_texts(10)))
    folder = prepare_store(data, TOKENIZER, progress=False)
    record = folder / "inputs.json"
    record.write_text(record.read_text().replace('"format": 3', '"format": 2'))
    with pytest.raises(ValueError, match=r"of another version of moba_train \(store format 2, now 3\)\. Set data\.reb"):
        prepare_store(data, TOKENIZER, progress=False)
    data.min_document_tokens = 2
    prepare_store(data, TOKENIZER, progress=False)
    assert f"{folder} was made by another version (store format 2, now 3): remove it" in caplog.text
    data.min_document_tokens, data.rebuild = 1, True
    prepare_store(data, TOKENIZER, progress=False)
    assert '"format": 3' in record.read_text()


def test_a_changed_tokenizer_is_refused_or_rebuilt(tmp_path: Path) -> None:
    """Another one is another store; another content under the same name is told."""
    data = config(tmp_path, jsonl(tmp_path / "a.jsonl", some_texts(10)))
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes(Path(TOKENIZER).read_bytes())
    folder = prepare_store(data, str(tokenizer), progress=False)
    tokenizer.write_bytes(lzma.decompress(Path(SMOLLM2).read_bytes()))
    with pytest.raises(
        ValueError, match=r"tokenizer\.json changed since the token store .* was made with it \(tokenizer "
    ):
        prepare_store(data, str(tokenizer), progress=False)
    data.rebuild = True
    assert prepare_store(data, str(tokenizer), progress=False) != folder


def test_the_embedded_documents_have_one_store_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(DATA / "books" / "heldout", copy / "books" / "heldout")
    names = []
    for root in (DATA, copy):
        monkeypatch.setattr(embedded, "folder", lambda name, root=root: root)
        source = SourceConfig(name="books", path=str(root / "books" / "heldout"))
        names.append(prepare_store(config(tmp_path, source), TOKENIZER, progress=False))
    assert names[0] == names[1]


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
    with pytest.raises(ValueError, match=r"00000\.tokens has -1 bytes"):
        TokenStore.open(store.path)
    manifest = store.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 3', '"format": 9'))
    with pytest.raises(ValueError, match="store format 9, not 3; prepare the data again"):
        TokenStore.open(store.path)


def test_bad_input_leaves_no_store(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["", "", "two words"])
    with pytest.raises(ValueError, match=r"data\.train names no source"):
        prepare_store(config(tmp_path), TOKENIZER)
    nothing = SourceConfig(name="n", path=str(tmp_path / "a.jsonl"), format=SourceFormat.jsonl, max_tokens=0)
    with pytest.raises(ValueError, match="source 'n' has max_tokens=0: give it at least 1"):
        prepare_store(config(tmp_path, nothing), TOKENIZER)
    with pytest.raises(ValueError, match=r"data\.heldout_fraction is 1\.0"):
        prepare_store(config(tmp_path, source, heldout_fraction=1.0), TOKENIZER)
    with pytest.raises(
        ValueError, match=r"the train split holds no document: sources 'a' gave 3 records, 2 empty, 1 sho"
    ):
        prepare_store(config(tmp_path, source, min_document_tokens=99), TOKENIZER, progress=False)
    (tmp_path / "empty.txt").write_text("")
    held = jsonl(tmp_path / "held.jsonl", ["held out"])
    with pytest.raises(ValueError, match="the train split holds no document: sources 'e' gave 1 records, 1 empty"):
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


def test_the_embedded_books(tmp_path: Path) -> None:
    train, heldout = (SourceConfig(name=split, path=str(DATA / "books" / split)) for split in ("train", "heldout"))
    assert len(find_files(train)) == 16
    store = prepared(DataConfig(name="books", train=[heldout], store_dir=str(tmp_path)))
    assert (len(store), store.tokens) == (2, 297_836)
    text = load_tokenizer(TOKENIZER).decode(store.document(0))
    assert text.startswith("[Sense and Sensibility by Jane Austen 1811]\n\nCHAPTER 1\n\n\nThe family of Dashwood")
    assert text.endswith("\n<|endoftext|>") and "\r" not in text
