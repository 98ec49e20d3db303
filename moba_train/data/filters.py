"""Documents that a store leaves out: texts it has already, and texts that share n-grams with evaluations."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import numpy as np

_WORD = re.compile(r"\w+")
_RECENT = 1 << 18


def digest(content: str | np.ndarray) -> int:
    """64 bits that tell texts, or rows of token ids, apart, signed: by chance, two of 10^8 are taken for one with a
    chance of 3e-4."""
    data = content.encode() if isinstance(content, str) else content.tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


class SeenTexts:
    """Digests of texts, at 8 bytes each: sorted, with the newest in a set beside them."""

    def __init__(self, digests: np.ndarray) -> None:
        self._sorted = np.unique(digests.astype(np.int64))
        self._recent: set[int] = set()

    def __contains__(self, value: int) -> bool:
        if value in self._recent:
            return True
        at = int(np.searchsorted(self._sorted, value))
        return at < len(self._sorted) and int(self._sorted[at]) == value

    def add(self, value: int) -> None:
        self._recent.add(value)
        if len(self._recent) >= _RECENT:
            recent = np.fromiter(self._recent, np.int64, len(self._recent))
            self._sorted = np.union1d(self._sorted, recent)
            self._recent = set()


class Overlap:
    """Runs of ``words`` consecutive words of evaluation texts, case and punctuation apart, as GPT-3's filter took them
    (13 words; Brown et al. 2020, appendix C). Texts with fewer words are not looked for.
    """

    def __init__(self, texts: Iterable[str], words: int) -> None:
        if words < 1:
            raise ValueError(f"data.exclude_words={words}: must be at least 1")
        self._words = words
        self._vocabulary: dict[str, int] = {}
        powers = [pow(0x9E3779B97F4A7C15, power, 1 << 64) for power in range(words)]
        self._powers = np.array(powers, np.uint64)
        hashes = [np.empty(0, np.uint64)]
        for text in texts:
            for match in _WORD.finditer(text.lower()):
                self._vocabulary.setdefault(match.group(), len(self._vocabulary))
            hashes.append(self._hashes(text))
        self._known = np.unique(np.concatenate(hashes))
        if not len(self._known):
            raise ValueError(f"data.exclude holds no text of data.exclude_words={words} words; lower that, or drop it")

    def found_in(self, text: str) -> bool:
        """Whether the text has a run of words that an evaluation text has."""
        return bool(np.isin(self._hashes(text), self._known).any())

    def _hashes(self, text: str) -> np.ndarray:
        """One hash a run of words that evaluation texts know, polynomial in their numbers, modulo 2**64."""
        numbers = np.fromiter(
            (self._vocabulary.get(match.group(), -1) for match in _WORD.finditer(text.lower())), np.int64
        )
        runs = len(numbers) - self._words + 1
        if runs < 1:
            return np.empty(0, np.uint64)
        unknown = np.concatenate([[0], np.cumsum(numbers < 0)])
        starts = np.flatnonzero(unknown[self._words :] == unknown[:runs])
        values = (numbers + 1).astype(np.uint64)
        found = np.zeros(len(starts), np.uint64)
        for offset, power in enumerate(self._powers):
            found += values[starts + offset] * power
        return found
