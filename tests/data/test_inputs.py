"""What a store was made of: the same inputs are the same store, and others are told from it."""

from __future__ import annotations

import json
import lzma
import os
import shutil
from pathlib import Path

import pytest

from moba_train import embedded
from moba_train.config import SourceConfig, SourceFormat
from moba_train.data import inputs
from moba_train.data.store import TokenStore
from moba_train.data.tokenizer import load_tokenizer
from moba_train.data.tokens import prepare_store
from small_stores import DATA, SMOLLM2, TOKENIZER, config, jsonl, some_texts


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


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    data = config(tmp_path, jsonl(tmp_path / "a.jsonl", some_texts(3)))
    folder = prepare_store(data, TOKENIZER, progress=False)
    (folder / "inputs.json").write_text("{")
    with pytest.raises(ValueError, match=r"inputs\.json is damaged \(Expecting .*\); delete \S+ and prepare it again"):
        prepare_store(data, TOKENIZER, progress=False)


@pytest.mark.parametrize(
    ("format", "fields", "message"),
    [
        ("text", {"group_field": "repo"}, "has group_field with format text, which has no fields: unset it"),
        ("repository", {"token_field": "ids"}, "has token_field with format repository, which has no fields: unset"),
        ("jsonl", {"group_field": "repo", "files_field": "files"}, "has group_field and files_field: a source has at"),
        ("mds", {"files_field": "files"}, "has files_field=files, which is not read with format mds: unset it"),
        (
            "jsonl",
            {"token_field": "ids", "span_field": "spans"},
            "has span_field=spans, which goes with format mds and",
        ),
        (
            "mds",
            {"span_field": "spans"},
            "has span_field=spans, which goes with format mds and a token_field: unset it",
        ),
        ("jsonl", {"token_field": "ids"}, r"\(token_field=ids\): set its tokenizer to the one that made them"),
        ("text", {"max_tokens": 0}, "has max_tokens=0: give it at least 1, or leave the source out"),
    ],
)
def test_settings_of_a_source_that_do_not_go_together(format: str, fields: dict[str, object], message: str) -> None:
    source = SourceConfig(name="mine", format=SourceFormat[format], **fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"source 'mine' .*{message}"):
        inputs.check_source(source, load_tokenizer(TOKENIZER))
