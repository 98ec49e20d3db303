"""Cut secrets out of a configuration before it is saved, logged or uploaded."""

from __future__ import annotations

import os
import re
from enum import Enum
from typing import Any

REDACTED = "<redacted>"
# Whole words, because "tokens", "tokenizer" and "monkey" are no secrets; and a "token_field" names a column.
_SECRET_NAME = re.compile(
    r"(^|[_.\-])(token|key|apikey|credentials?)($|[_.\-](?!field$))|secret|passw(or)?d", re.IGNORECASE
)
_ASSIGNMENT = re.compile(r"\b([A-Z][A-Z0-9_]*)=([^\s$]\S*)")  # in a line of shell; of another variable is no secret
_SHORTEST_SECRET = 8  # shorter environment values ("1", "true") would blank unrelated text


def redact(config: Any) -> Any:
    """A copy without secrets, of plain values: strings under a name such as ``api_key``, ``token`` or ``password`` are
    hidden, and wherever they occur the values of environment variables so named, and what a line of shell assigns to
    one; an Enum becomes its name."""
    values = [
        value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET
    ]
    return _redact(config, sorted(values, key=len, reverse=True))


def _redact(value: Any, secret_values: list[str], name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _redact(inner, secret_values, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(inner, secret_values, name) for inner in value]
    if isinstance(value, Enum):
        return value.name
    if not isinstance(value, str):
        return value
    if value and _SECRET_NAME.search(name):
        return REDACTED
    for secret in secret_values:
        value = value.replace(secret, REDACTED)
    return _ASSIGNMENT.sub(_redact_assignment, value)


def _redact_assignment(found: re.Match[str]) -> str:
    return f"{found[1]}={REDACTED}" if _SECRET_NAME.search(found[1]) else found[0]
