"""What became of a source's records: how many are documents, and why the others are none."""

from __future__ import annotations

from dataclasses import dataclass

from moba_train.config import SourceConfig

MOST_DROPPED = 0.001  # of a source's records

# What becomes of a record that gives no document: the field of Tally that counts it, and how people read it.
DROPPED = {
    "bad": "bad",
    "empty": "empty",
    "short": "too short",
    "duplicate": "duplicate",
    "in_heldout": "also held out",
    "overlapping": "overlaps an evaluation",
    "other_split": "other split",
}


@dataclass
class Tally:
    """What became of a source's records."""

    records: int = 0
    bad: int = 0  # unreadable, or without a text
    empty: int = 0
    short: int = 0  # fewer tokens than data.min_document_tokens
    duplicate: int = 0  # the text of an earlier document, of this source or another
    in_heldout: int = 0  # the text of a held-out document
    overlapping: int = 0  # shares a run of words with a text of data.exclude
    other_split: int = 0  # held out, or kept for training
    documents: int = 0
    tokens: int = 0
    first_bad: str = ""

    def count(self, fate: str, source: SourceConfig, problem: str = "") -> None:
        """Enter a record that became a "document", or was left out for one of the reasons in DROPPED."""
        self.records += 1
        if fate == "bad":
            self.add_bad(source, problem)
        elif fate == "document":
            self.documents += 1
        else:
            setattr(self, fate, getattr(self, fate) + 1)

    def add_bad(self, source: SourceConfig, problem: str) -> None:
        """Count a bad record.

        Raises:
            ValueError: as ``check``, from the eleventh on.
        """
        self.bad += 1
        self.first_bad = self.first_bad or problem
        if self.bad > 10:  # too few to judge by until the source's end
            self.check(source)

    def check(self, source: SourceConfig) -> None:
        """
        Raises:
            ValueError: more than MOST_DROPPED of the records are bad; names the first one's place and fault.
        """
        if self.bad > MOST_DROPPED * self.records:
            raise ValueError(
                f"source {source.name!r}: {self.bad} of {self.records} records are bad, above {MOST_DROPPED:.1%}; "
                f"the first: {self.first_bad}"
            )
