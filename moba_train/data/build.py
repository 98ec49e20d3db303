"""Records → one token store, in order and from wherever an interrupted preparation stopped.

Records are read, long texts cut into pieces, pieces encoded in batches by the tokenizer library's own threads while the
next ones are read, documents appended to the store. After a kill at any point the next call goes on after the last
whole shard and ends with the same files.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from moba_train.config import DataConfig
from moba_train.data import inputs
from moba_train.data.encode import encode
from moba_train.data.filters import SeenTexts
from moba_train.data.progress import progress_bar
from moba_train.data.split import Split, check_documents, fate_of, origins
from moba_train.data.store import MANIFEST, StoreWriter, TokenStore
from moba_train.data.tally import Tally
from moba_train.data.tokenizer import Tokenizer

SHARD_BYTES = 32 << 20  # a kill loses what was tokenised for the newest shard: half a minute on 2 cores

log = logging.getLogger(__name__)


def build(
    folder: Path, split: Split, data: DataConfig, tokenizer: Tokenizer, files: inputs.Files, progress: bool
) -> None:
    """Make the store of a split in ``folder``, or what is missing of it.

    Raises:
        NoDocument: no record gave one.
        ValueError: a source that cannot be read, is too often bad, holds a token id beyond the vocabulary, or changed
            meanwhile.
    """
    path = folder / split.name
    writer = StoreWriter(path, tokenizer.vocab_size, SHARD_BYTES)
    tallies = [Tally() for _ in split.sources]
    place = (0, 0, 0)  # the next source, file and row to read
    if writer.state:
        tallies = [Tally(**tally) for tally in writer.state["tallies"]]
        place = tuple(writer.state["place"])
        log.info("going on with %s after %d whole shards", path, len(writer.shards))
    # What the store holds decides what is a duplicate, so that an interruption changes nothing.
    seen, held = SeenTexts(writer.digests()), _heldout_digests(folder, split)
    end = [np.array([tokenizer.eos_id], np.uint32)] if data.append_eos else []

    def close_shard(place: tuple[int, int, int]) -> None:
        writer.close_shard({"place": place, "tallies": [asdict(tally) for tally in tallies]})

    def enough(number: int) -> bool:
        return split.enough(number, tallies[number].tokens)

    with progress_bar(split, progress) as advance:
        for origin, parts in encode(origins(split, place, tokenizer, data, enough), tokenizer):
            if enough(origin.source):
                continue  # read ahead of the record that reached it
            source, tally = split.sources[origin.source][0], tallies[origin.source]
            tokens = sum(map(len, parts))
            fate = fate_of(origin, tokens, seen, held, data)
            tally.count(fate, source, origin.problem)
            if fate == "document":
                seen.add(origin.digest)
                whole = parts if source.token_field else parts + end
                tally.tokens += sum(map(len, whole))
                try:
                    full = writer.add(whole, origin.source, origin.digest)
                except ValueError as error:
                    raise ValueError(f"{split.place(origin)}: {error}") from None
                if full:
                    close_shard((origin.source, origin.file, origin.row + 1))
            advance(origin, tokens)
    check_documents(split, tallies, data.min_document_tokens)
    close_shard((len(split.sources), 0, 0))
    writer.finish(_description(split, data, tokenizer, files, tallies))


def _description(
    split: Split, data: DataConfig, tokenizer: Tokenizer, files: inputs.Files, tallies: list[Tally]
) -> dict[str, Any]:
    """What the store's manifest says of its making."""
    sources = [
        inputs.describe(source) | inputs.summary(of_source) | asdict(tally)
        for (source, _), of_source, tally in zip(split.sources, files[split.group], tallies, strict=True)
    ]
    settings = {name: value for name, value in inputs.settings(data, tokenizer).items() if name not in inputs.GROUPS}
    return {"split": split.name, **settings, "tokenizer_path": tokenizer.path, "sources": sources}


def _heldout_digests(folder: Path, split: Split) -> SeenTexts:
    """Of the held-out documents, for the split that must not have them. They are made first."""
    made = split.name == "train" and (folder / "heldout" / MANIFEST).is_file()
    return SeenTexts(TokenStore.open(folder / "heldout").digests() if made else np.empty(0))
