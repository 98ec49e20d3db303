"""Load a tokenizer from a file, a folder or the hub; train a small one. Everything rests on ``tokenizers``."""

from __future__ import annotations

import hashlib
import json
import lzma
import re
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers

from moba_train import hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
# How known tokenizers call the token between documents, for a tokenizer.json that comes without its configuration.
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")
# Where a long text may be cut, if the tokenizer makes the same tokens of both sides of these as of the whole: before
# the space between two letters; after the line end before a letter or digit.
CUTS = {
    r"(?<=[^\W\d_]) (?=[^\W\d_])": (
        ("a word", "two\n\nlines", "It's", "7 of x", "été", "{ tab\tx", "end.\r\nThen"),
        (" then", " A\n", " été", " I'm 7."),
    ),
    r"(?<=\S\n)(?=[^\W_])": (
        ("a word\n", "two\n\nlines.\n", "été\n", "1,2\n", "if (x) {\n", "中文。\n", "//\n"),
        ("then", "The end", "A\n", "été", "42,7", "import x", "中文"),
    ),
}


class Tokenizer:
    """Text to token ids, without special tokens added or parsed: a document that holds the characters of
    ``<|endoftext|>`` cannot end itself.

    ``sha256`` is of what decides the ids in the tokenizer's own JSON, so that a file, its compressed copy and a folder
    with it agree.

    ``source`` is what transformers loaded, where it did: ``save`` writes it as it was.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, eos_id: int, path: str, source: PreTrainedTokenizerBase | None = None
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        self.backend = backend
        self.eos_id = eos_id
        self.path = path
        self.source = source
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        # The post-processor adds special tokens: not used here, and set anew by some loaders.
        self.sha256 = self._sha256_without("post_processor")

    def text_sha256(self) -> str:
        """Of what decides the ids of texts. No text becomes a special token, so Llama 3 and 3.1 agree in it."""
        return self._sha256_without("post_processor", "added_tokens")

    def _sha256_without(self, *parts: str) -> str:
        content = json.loads(self.backend.to_str())
        for part in parts:
            del content[part]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """One uint32 array of ids a text.

        Raises:
            ValueError: a text that the tokenizer has no ids for.
        """
        try:
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # of the library's own, with no name
            raise ValueError(f"tokenizer {self.path!r} cannot encode a text ({error}): take another") from error
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def cuts(self) -> re.Pattern[str] | None:
        """Where a text may be cut, to be encoded in parts; None where it may not be. Byte-level BPE allows ``CUTS``:
        its pre-tokenizer splits there. SentencePiece-like models do not (they mark the start of a text)."""
        allowed = [
            place
            for place, (lefts, rights) in CUTS.items()
            if all(self._joins(left, right) for left in lefts for right in rights)
        ]
        return re.compile("|".join(allowed)) if allowed else None

    def _joins(self, left: str, right: str) -> bool:
        try:
            whole, *parts = self.encode_batch([left + right, left, right])
        except ValueError:  # it has no ids for these characters, which the texts may do without
            return False
        return np.array_equal(np.concatenate(parts), whole)

    def save(self, folder: Path, context_length: int = 0) -> None:
        """Write the files that ``transformers.AutoTokenizer`` loads.

        A tokenizer that came from a folder or the hub keeps its special tokens, chat template and other settings; its
        ``model_max_length`` becomes at least ``context_length`` tokens. One of a bare ``tokenizer.json`` gets an
        end-of-text token, which is all that is known of it.
        """
        from transformers import PreTrainedTokenizerFast

        if self.source is not None:
            saved = deepcopy(self.source)
            saved.model_max_length = max(saved.model_max_length, context_length)
        else:
            # No pad token: the usual stand-in, eos, has collators mask the true ends of documents as padding.
            name = self.backend.id_to_token(self.eos_id)
            saved = PreTrainedTokenizerFast(tokenizer_object=self.backend, eos_token=name)
        saved.save_pretrained(folder)


def load_tokenizer(path: str) -> Tokenizer:
    """``path``: a ``tokenizer.json`` (or ``.json.xz``), a Hugging Face folder, or a hub name, ``owner/name``."""
    file = Path(path)
    if file.is_file():
        return _from_file(file)
    local = file.suffix in {".json", ".xz"} or file.is_absolute() or path.startswith(".")
    # The hub is asked for owner/name alone: for any other name it would be retried for a minute before the same answer.
    # That leaves out its few old names without an owner, which all have one by now.
    if not file.is_dir() and (local or path.count("/") != 1):
        raise ValueError(
            f"tokenizer {path!r} does not exist; name a tokenizer.json, its folder, or owner/name on the hub "
            "(gpt2 is openai-community/gpt2)"
        )
    return _from_transformers(path)


def _from_file(file: Path) -> Tokenizer:
    try:
        content = lzma.decompress(file.read_bytes()) if file.suffix == ".xz" else file.read_bytes()
        backend = tokenizers.Tokenizer.from_buffer(content)
    except (lzma.LZMAError, ValueError) as error:
        raise ValueError(f"tokenizer {str(file)!r} is not a tokenizers JSON file: {error}") from error
    ids = [backend.token_to_id(name) for name in END_NAMES]
    known = [i for i in ids if i is not None]
    if not known:
        raise ValueError(
            f"tokenizer {str(file)!r} has none of {', '.join(END_NAMES)} to end a document with; "
            "name its folder, whose tokenizer_config.json says eos_token"
        )
    return Tokenizer(backend, known[0], str(file))


def _from_transformers(path: str) -> Tokenizer:
    from transformers import AutoTokenizer  # seconds to import; a tokenizer.json needs none of it

    try:
        loaded = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=hub.out_of_reach(path))
    except Exception as error:  # transformers reads the file by parts: one that lacks some raises whatever it may
        first = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(": ")
        raise ValueError(
            f"tokenizer {path!r} cannot be loaded as a folder or hub name ({first}): name a tokenizer.json, or the "
            "whole folder of one"
        ) from error
    if not getattr(loaded, "is_fast", False):
        raise ValueError(f"tokenizer {path!r} has no tokenizer.json; convert it to a fast tokenizer first")
    if loaded.eos_token_id is None:
        raise ValueError(f"tokenizer {path!r} names no eos_token; set it in its tokenizer_config.json")
    # A copy, because Tokenizer changes its backend, and the source is saved with the padding and truncation it had.
    return Tokenizer(deepcopy(loaded.backend_tokenizer), loaded.eos_token_id, path, loaded)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of ``vocab_size`` entries, ``<|endoftext|>`` (id 0) and the 256 bytes among them."""
    if vocab_size < 257:
        raise ValueError(f"vocab_size is {vocab_size}; a byte-level vocabulary needs at least 257 entries")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, eos_id=0, path="trained here")  # special tokens come first in the vocabulary
