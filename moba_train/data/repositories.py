"""Code repositories → one document each: their text files in path or import order, each under a header with its path.

A repository is a folder or an archive, which is read in memory and never unpacked. Left out are what is hidden (.git),
what is no UTF-8 text (a NUL counts as binary) or not so named, and files over MOST_BYTES, which are data rather than
code.
"""

from __future__ import annotations

import glob
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from moba_train.config import SourceConfig
from moba_train.data.formats import Record, join

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
MOST_BYTES = 1 << 20  # of a file


def find(path: Path) -> tuple[Path, list[Path]]:
    """A folder, and the repositories in it: those of ``path``, or ``path`` itself where it is one, or a glob's."""
    if _is_repository(path):
        return path.parent, [path]
    if path.is_dir():
        return path, [entry for entry in path.iterdir() if not entry.name.startswith(".") and _readable(entry)]
    if glob.has_magic(str(path)):
        fixed = Path(*path.parts[: [glob.has_magic(part) for part in path.parts].index(True)])
        return fixed, [entry for name in glob.glob(str(path)) if _readable(entry := Path(name))]
    return path, []


def _is_repository(path: Path) -> bool:
    return (path / ".git").exists() or (path.is_file() and path.name.endswith(ARCHIVES))


def _readable(path: Path) -> bool:
    return path.is_dir() or path.name.endswith(ARCHIVES)


def read(source: SourceConfig, path: Path) -> Iterator[Record]:
    """The repository as one record; its text is empty where it holds no text file."""
    found = _without_top([(PurePosixPath(name), text) for name, text in _text_files(source, path)])
    found.sort(key=lambda file: file[0].parts)
    yield Record(0, 0, join(source, [(name.as_posix(), text) for name, text in found]))


def _text_files(source: SourceConfig, path: Path) -> Iterator[tuple[str, str]]:
    for name, content in files(source, path):
        if b"\0" not in content:
            with suppress(UnicodeError):
                name.encode()  # some file systems and archives take any bytes for a name
                yield name, content.decode("utf-8-sig").replace("\r\n", "\n")


def files(source: SourceConfig, path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of the wanted regular files of a folder or an archive, in its own order: going back in a
    compressed archive reads it from the start again."""
    if path.is_dir():
        for file in path.rglob("*"):
            name = file.relative_to(path).as_posix()
            if file.is_file() and not file.is_symlink() and _wanted(source, name, file.stat().st_size):
                yield name, file.read_bytes()
    elif path.name.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir() and _wanted(source, info.filename, info.file_size):
                    yield info.filename, archive.read(info)
    else:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile() and _wanted(source, member.name, member.size):
                    stream = tar.extractfile(member)
                    yield member.name, stream.read() if stream else b""


def _wanted(source: SourceConfig, name: str, size: int) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    named = not source.file_suffixes or path.name.endswith(tuple(source.file_suffixes))
    return 0 < size <= MOST_BYTES and named and not hidden


def _without_top(files: list[tuple[PurePosixPath, str]]) -> list[tuple[PurePosixPath, str]]:
    """Paths without the one folder that all files of an archive may lie in (name-1.0/)."""
    strip = len({path.parts[0] for path, _ in files}) == 1 and all(len(path.parts) > 1 for path, _ in files)
    return [(PurePosixPath(*path.parts[1:]), text) for path, text in files] if strip else files
