"""Train the embedded corpus's tokenizer on its training books: byte-level BPE, 4,096 entries.

    python scripts/train_tokenizer.py

The result is the same file every time: training is deterministic for one version of ``tokenizers``.
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path

from moba_train.data.tokenizer import train_tokenizer

DATA = Path(__file__).resolve().parent.parent / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, default=DATA / "books" / "train", help="folder of .txt.xz files")
    parser.add_argument("--out", type=Path, default=DATA / "tokenizer" / "tokenizer.json")
    parser.add_argument("--vocab-size", type=int, default=4096)
    arguments = parser.parse_args()

    books = sorted(arguments.books.glob("*.txt.xz"))
    texts = [lzma.decompress(book.read_bytes()).decode("utf-8") for book in books]
    tokenizer = train_tokenizer(texts, arguments.vocab_size)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.backend.save(str(arguments.out))
    characters = sum(map(len, texts))
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    print(f"{arguments.out}: {tokenizer.vocab_size} entries; {characters / tokens:.2f} characters a token in training")


if __name__ == "__main__":
    main()
