"""What differs between the inputs of two stores, in words."""

from __future__ import annotations

from typing import Any


def describe_changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """``before`` and ``after``: what `tokens.plan` says two stores depend on."""
    changes = [
        f"{key} {_short(before.get(key))} -> {_short(value)}"
        for key, value in after.items()
        if not isinstance(value, list) and before.get(key) != value
    ]
    for group in (key for key, value in after.items() if isinstance(value, list)):
        old, new = ({source["name"]: source for source in inputs.get(group, [])} for inputs in (before, after))
        for name in sorted(old.keys() | new.keys()):
            changes += [f"{group} source {name!r} {what}" for what in _of_source(old.get(name), new.get(name))]
    return changes


def _of_source(old: dict[str, Any] | None, new: dict[str, Any] | None) -> list[str]:
    if old is None or new is None:
        return ["is new" if old is None else "is gone"]
    keys = sorted((old.keys() | new.keys()) - {"files"})
    found = [f"{key} {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
    had, has = ({name: rest for name, *rest in source["files"]} for source in (old, new))
    differing = {
        "changed": [name for name in had.keys() & has.keys() if had[name] != has[name]],
        "new": list(has.keys() - had.keys()),
        "gone": list(had.keys() - has.keys()),
    }
    found += [f"files {what}: {min(names)}, {len(names)} in all" for what, names in differing.items() if names]
    return found


def _short(value: Any) -> str:
    return str(value)[:12]  # of a tokenizer's sha256 that is enough
