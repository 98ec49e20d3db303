"""Where the files that come with the package are: recipes, the default corpus, its tokenizer and base model.

In a checkout they stand at the top level; in an installed wheel, inside the package.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """The folder ``configs`` or ``data`` that belongs to this installation."""
    installed = _PACKAGE / "embedded" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name
