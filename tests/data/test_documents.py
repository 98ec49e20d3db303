"""Reading sources: each format and compression, and every kind of damage with its documented outcome."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moba_train.config import SourceConfig, SourceFormat
from moba_train.data.documents import find_files, read_documents, read_records
from moba_train.data.tally import Tally

TEXTS = ["first document", "zweites Dokument äöü", "third\nwith\n\nlines " * 50, "4"]


def source(path: Path | str, kind: str, **more: str) -> SourceConfig:
    return SourceConfig(name="mine", format=SourceFormat(kind), path=str(path), **more)


def texts(config: SourceConfig) -> list[str]:
    return [document["text"] for document in read_documents(config)]


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def write_jsonl(path: Path, records: list[object], compress: Callable[[bytes], bytes] = bytes) -> Path:
    path.write_bytes(compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    return path


def write_arrow(path: Path, table: pa.Table, stream: bool) -> Path:
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize(
    ("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)]
)
def test_compressions(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(TEXTS[1].encode()))
    (tmp_path / f"b.md{suffix}").write_bytes(compress(TEXTS[2].encode()))
    (tmp_path / "ignored.log").write_text("not a document")
    assert texts(source(tmp_path, "text")) == TEXTS[1:3]
    write_jsonl(tmp_path / f"c.jsonl{suffix}", [{"text": text} for text in TEXTS], compress)
    assert texts(source(tmp_path, "jsonl")) == TEXTS


def test_zstd_of_several_frames(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl.zst", [{"text": "one"}], lambda content: zstd(content) * 3)
    assert texts(source(path, "jsonl")) == ["one"] * 3


def test_columns(tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2, 3, 4], "body": TEXTS})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    write_arrow(tmp_path / "stream.arrow", table, stream=True)
    write_arrow(tmp_path / "file.arrow", table, stream=False)
    assert texts(source(tmp_path, "parquet", text_field="body")) == TEXTS
    assert texts(source(tmp_path, "arrow", text_field="body")) == TEXTS * 2
    with pytest.raises(ValueError, match=r"no field 'text' but 'id', 'body'; set the source's text_field"):
        texts(source(tmp_path, "parquet"))


def test_hub_dataset(tmp_path: Path) -> None:
    """A folder stands in for a dataset on the hub: the same call of the datasets library reads both."""
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "train.parquet")
    config = source(tmp_path, "hub", text_field="body")
    assert texts(config) == TEXTS
    assert [record.text for record in read_records(config, [], 0, 2)] == TEXTS[2:]
    with pytest.raises(ValueError, match="no field 'text' but 'body'"):
        texts(source(tmp_path, "hub"))
    with pytest.raises(ValueError, match=r"source 'mine': hub dataset .* cannot be opened"):
        texts(source(tmp_path, "hub", split="validation", text_field="body"))


def test_order_names_and_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b/2.txt", "a/1.txt", "a/3.txt", "c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    documents = list(read_documents(source(tmp_path, "text")))
    assert [document["name"] for document in documents] == ["a/1.txt#0", "a/3.txt#0", "b/2.txt#0"]
    assert texts(source(tmp_path / "a" / "*.txt", "text")) == ["a/1.txt", "a/3.txt"]
    assert texts(source(tmp_path / "*.csv", "text")) == ["c.csv"]
    monkeypatch.chdir(tmp_path)
    assert [file.name for file in find_files(source("**/*.txt", "text"))] == ["a/1.txt", "a/3.txt", "b/2.txt"]


def test_text_encodings(tmp_path: Path) -> None:
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfafter the mark\r\nline\x00end")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    assert texts(source(tmp_path / "bom.txt", "text")) == ["after the mark\nline\x00end"]
    assert texts(source(tmp_path / "latin.txt", "text", encoding="latin-1")) == ["naïve"]
    with pytest.raises(ValueError, match=r"latin\.txt is not utf-8 at byte 2; set the source's encoding"):
        texts(source(tmp_path, "text"))
    with pytest.raises(ValueError, match="encoding 'utf-77' is unknown"):
        texts(source(tmp_path, "text", encoding="utf-77"))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{not json}", "line 2001 is not JSON"),
        (b'{"text": "cut off', "line 2001 is not JSON"),
        (b'{"text": "\xff"}', "line 2001 is not JSON"),
        (b'{"other": 1}', "line 2001 has no field 'text'"),
        (b'["text"]', "line 2001 is a JSON list; JSONL has an object a line"),
        (b'{"text": 7}', "line 2001: the text is int, not a string"),
        (b'{"text": null}', "line 2001: the text is NoneType"),
        (b'{"text": "\\ud800"}', "line 2001 is not Unicode text"),
        (b"[" * 100_000, "line 2001 is not JSON"),
    ],
    ids=["syntax", "cut", "utf8", "field", "list", "number", "null", "surrogate", "nesting"],
)
def test_a_bad_record_is_dropped_and_more_than_a_thousandth_stop(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    good = b'{"text": "good"}\n'
    path.write_bytes(good * 2000 + line + b"\n" + good)
    assert texts(source(path, "jsonl")) == ["good"] * 2001
    path.write_bytes(good * 2000 + (line + b"\n") * 3)
    with pytest.raises(ValueError, match=r"3 of 2003 records are bad, above 0\.1%; the first: ") as caught:
        texts(source(path, "jsonl"))
    assert problem in str(caught.value)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_bad_utf8_in_columns(tmp_path: Path, kind: str) -> None:
    """One such record in 2,000 is dropped, three are too many."""
    for bad, outcome in ((1, None), (3, "3 of 2000 records are bad")):
        raw = pa.array([b"good"] * (2000 - bad) + [b"\xff\xfe"] * bad)
        table = pa.table({"text": pa.StringArray.from_buffers(len(raw), *raw.buffers()[1:])})  # unchecked
        path = tmp_path / f"a.{kind}"
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            write_arrow(path, table, stream=True)
        if outcome is None:
            assert texts(source(path, kind)) == ["good"] * 1999
        else:
            with pytest.raises(ValueError, match=rf"{outcome}.*row 1997 is not UTF-8"):
                texts(source(path, kind))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz", "a.jsonl.zst"])
def test_an_empty_file_gives_no_document(tmp_path: Path, name: str) -> None:
    empty = {".gz": gzip.compress, ".zst": zstd}.get(Path(name).suffix, bytes)(b"")
    (tmp_path / name).write_bytes(empty)
    config = source(tmp_path / name, name.split(".")[1].replace("txt", "text"))
    assert texts(config) == []
    records = list(read_records(config, find_files(config)))
    assert [record.text for record in records] == ([""] if "txt" in name else [])


def test_many_bad_records_stop_early(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "good"}] + [{"text": 1}] * 5000)
    with pytest.raises(ValueError, match=r"11 of 12 records are bad"):
        texts(source(path, "jsonl"))


def test_blank_lines_empty_texts_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n  \n{"text": ""}\n{"text": "two"}')
    assert texts(source(path, "jsonl")) == ["one", "two"]


def test_first_record_without_the_field(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"content": "x", "meta": {}}])
    with pytest.raises(
        ValueError, match=r"a\.jsonl has no field 'text' but 'content', 'meta'; set the source's text_fie"
    ):
        texts(source(path, "jsonl"))


FILES = ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst", "a.parquet", "a.arrow"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in FILES for damage in ("truncated", "garbage")]
    # An emptied .gz or .zst is an empty stream to their libraries: no records.
    + [("a.jsonl.xz", "emptied"), ("a.parquet", "emptied"), ("a.arrow", "emptied")],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    table = pa.table({"text": TEXTS * 100})
    content = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 100).encode()
    if name.endswith("parquet"):
        pq.write_table(table, path)
    elif name.endswith("arrow"):
        write_arrow(path, table, stream=False)
    else:
        path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}[path.suffix](content))
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) * 2 // 3], "garbage": b"garbage" * 99, "emptied": b""}[damage])
    config = source(path, name.split(".")[1].replace("txt", "text"))
    with pytest.raises(
        ValueError, match=rf"source 'mine': .*{name} cannot be read \(.*\); replace it, or leave it out"
    ):
        texts(config)


def test_missing_and_empty_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source 'mine': path '.*nowhere' does not exist; looked for /"):
        find_files(source(tmp_path / "nowhere", "text"))
    with pytest.raises(ValueError, match=r"has no \.txt or \.md files"):
        find_files(source(tmp_path, "text"))
    with pytest.raises(ValueError, match="matches no file"):
        find_files(source(tmp_path / "*.txt", "text"))
    with pytest.raises(ValueError, match="source 'mine' has no path"):
        find_files(source("", "text"))


def test_resume_inside_a_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(5)])
    write_jsonl(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(5)])
    config = source(tmp_path, "jsonl")
    files = find_files(config)
    everything = list(read_records(config, files))
    for at, record in enumerate(everything):
        assert list(read_records(config, files, record.file, record.row)) == everything[at:]


def test_tally_needs_records_to_judge() -> None:
    tally = Tally(records=5)
    for _ in range(10):
        tally.add_bad(source("x", "text"), "why")
    with pytest.raises(ValueError, match="the first: why"):
        tally.add_bad(source("x", "text"), "another")
