"""Code repositories as documents: from folders, from archives, and from records of one repository that follow."""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moba_train.config import FileOrder, SourceConfig, SourceFormat
from moba_train.data.documents import find_files, read_documents, read_records
from moba_train.data.repositories import MOST_BYTES

FILES = {
    "src/b.py": b"import a\r\nb = 2",
    "src/a.py": b"\xef\xbb\xbfa = 1\n",
    "README.md": "naïve\n".encode(),
    "setup.py": b"setup()\n",
    "src/empty.py": b"",
    "src/logo.png": b"\x89PNG\0\0",
    "src/latin.py": b"# na\xefve\n",
    "src/big.json": b"1" * (MOST_BYTES + 1),
    ".github/ci.yml": b"hidden\n",
}
DOCUMENT = (
    "==> README.md <==\nnaïve\n==> setup.py <==\nsetup()\n==> src/a.py <==\na = 1\n==> src/b.py <==\nimport a\nb = 2\n"
)


def source(path: Path | str, **more: object) -> SourceConfig:
    return SourceConfig(name="code", format=SourceFormat.repository, path=str(path), **more)  # type: ignore[arg-type]


def texts(config: SourceConfig) -> list[str]:
    return [document["text"] for document in read_documents(config)]


def write_folder(path: Path) -> Path:
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def write_archive(path: Path, top: str) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in FILES.items():
                archive.writestr(top + name, content)
    else:
        with tarfile.open(path, f"w:{path.suffix[1:].replace('tgz', 'gz').replace('tar', '')}") as tar:
            link = tarfile.TarInfo(f"{top}src/link.py")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
            for name, content in FILES.items():
                member = tarfile.TarInfo(top + name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("top", ["", "code-1.0/"], ids=["flat", "in a folder"])
@pytest.mark.parametrize("name", ["r.tar", "r.tar.gz", "r.tgz", "r.tar.bz2", "r.tar.xz", "r.zip"])
def test_archives(tmp_path: Path, name: str, top: str) -> None:
    assert texts(source(write_archive(tmp_path / name, top))) == [DOCUMENT]


def test_folder_of_repositories(tmp_path: Path) -> None:
    write_folder(tmp_path / "two")
    (tmp_path / "two" / os.fsdecode(b"na\xefve.py")).write_text("not named in UTF-8: left out\n")
    write_archive(tmp_path / "one.tar.gz", "one/")
    (tmp_path / "nothing").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "notes.txt").write_text("no repository")
    config = source(tmp_path)
    assert [file.name for file in find_files(config)] == ["nothing", "one.tar.gz", "two"]
    assert texts(config) == [DOCUMENT, DOCUMENT]
    assert next(read_records(config, find_files(config))).text == ""  # counted as empty
    assert texts(source(tmp_path / "t*")) == [DOCUMENT]


def test_a_checkout_is_one_repository(tmp_path: Path) -> None:
    (write_folder(tmp_path / "checkout") / ".git").mkdir()
    assert texts(source(tmp_path / "checkout")) == [DOCUMENT]


def test_settings(tmp_path: Path) -> None:
    write_folder(tmp_path / "r")
    config = source(tmp_path, file_header="<file_sep>{path}\n", file_suffixes=[".md", "setup.py"])
    assert texts(config) == ["<file_sep>README.md\nnaïve\n<file_sep>setup.py\nsetup()\n"]


def test_a_changed_file_changes_the_source(tmp_path: Path) -> None:
    write_folder(tmp_path / "r")
    before = find_files(source(tmp_path))
    (tmp_path / "r" / "src" / "a.py").write_text("a = 3\n")
    after = find_files(source(tmp_path))
    assert after != before
    (tmp_path / "r" / ".git").mkdir()
    (tmp_path / "r" / ".git" / "index").write_text("git writes here when it is asked for the status")
    assert find_files(source(tmp_path)) == after


def test_bad_archives_and_paths(tmp_path: Path) -> None:
    whole = write_archive(tmp_path / "r.tar.gz", "").read_bytes()
    for content in (whole[: len(whole) // 2], b"garbage"):
        (tmp_path / "r.tar.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"source 'code': .*r\.tar\.gz cannot be read .*or leave it out$"):
            texts(source(tmp_path))
    (tmp_path / "bad.zip").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"bad\.zip cannot be read"):
        texts(source(tmp_path / "bad.zip"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no repository: neither a folder nor one of"):
        find_files(source(tmp_path / "empty"))


ROWS = [
    {"content": "a = 1", "repo": "x", "file": "a.py"},
    {"content": "b = 2\n", "repo": "x", "file": "b.py"},
    {"content": "c = 3\n", "repo": "y", "file": "c.py"},
    {"content": "d = 4\n", "repo": "x", "file": "d.py"},
    {"content": "e = 5\n", "repo": None, "file": "e.py"},
    {"content": "f = 6\n", "repo": None, "file": None},
]
JOINED = [
    "==> a.py <==\na = 1\n==> b.py <==\nb = 2\n",
    *(f"==> {n}.py <==\n{n} = {i}\n" for n, i in (("c", 3), ("d", 4), ("e", 5))),
]
JOINED.append("==>  <==\nf = 6\n")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_records_of_one_repository_are_joined(tmp_path: Path, kind: str) -> None:
    if kind == "jsonl":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "train.parquet")
    fields = {"text_field": "content", "group_field": "repo", "path_field": "file"}
    config = SourceConfig(name="code", format=SourceFormat(kind), path=str(tmp_path), **fields)  # type: ignore[arg-type]
    files = find_files(config)
    records = list(read_records(config, files))
    assert [record.text for record in records] == JOINED
    for at, record in enumerate(records):  # an interrupted reader goes on with the next document
        rest = list(read_records(config, files, record.file, record.row + 1))
        assert [later.text for later in rest] == JOINED[at + 1 :]
    if kind == "jsonl":  # each is told once, and those around it still are one document
        broken = '{"content": "", "repo": "x", "file": "\\ud800"}'
        (tmp_path / "a.jsonl").write_text("\n".join([*map(json.dumps, ROWS[:2]), broken, *map(json.dumps, ROWS[2:])]))
        found = list(read_records(config, files))
        assert [record.text for record in found] == [None, *JOINED]
        assert [record.text for record in read_records(config, files, 0, found[1].row + 1)] == JOINED[1:]
    config.group_field = "repository"
    with pytest.raises(ValueError, match=r"has no field 'repository' but .*; set the source's group_field and path_fi"):
        texts(config)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_records_that_are_repositories(tmp_path: Path, kind: str) -> None:
    files = [
        {"path": "b.py", "content": "b = 2"},
        {"path": "a.py", "content": "import b\n"},
        {"path": "c", "content": None},
    ]
    rows = [{"repo": "x", "files": files}, {"repo": "empty", "files": []}]
    if kind == "jsonl":
        bad = [{"files": [{"content": "no path"}]}, {"files": 3}, {"files": [{"path": "a", "content": 7}]}]
        bad.append({"files": [{"path": "a", "content": "\ud800"}]})
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + bad))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    config = SourceConfig(name="code", format=SourceFormat(kind), path=str(tmp_path), text_field="content")
    config.files_field = "files"
    found = list(read_records(config, find_files(config)))
    assert [one.text for one in found[:2]] == ["==> a.py <==\nimport b\n==> b.py <==\nb = 2\n", ""]
    assert all("'files' is no list of files with 'path' and 'content'" in one.problem for one in found[2:-1])
    assert kind != "jsonl" or "line 6 is not Unicode text" in found[-1].problem
    config.file_order = FileOrder.imports
    assert next(read_records(config, find_files(config))).text == "==> b.py <==\nb = 2\n==> a.py <==\nimport b\n"
    config.files_field = "content"
    with pytest.raises(ValueError, match=r"has no field 'content' but .*; set the source's files_field"):
        texts(config)
