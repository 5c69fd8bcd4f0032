"""Which values of a JSON object are of the kind that a reader shows: a person may have edited the file."""

from __future__ import annotations

from typing import Any

MAX_NUMBER = 1 << 63


def keep_kinds(values: dict[str, Any], kinds: dict[str, type]) -> dict[str, Any]:
    """`values` without those that are not of the kind that `kinds` has for their key."""
    return {key: value for key, value in values.items() if key not in kinds or is_kind(value, kinds[key])}


def is_kind(value: Any, kind: type) -> bool:
    """Numbers are finite and less than MAX_NUMBER; an int is also a float, a bool neither."""
    if kind is int or kind is float:
        allowed = (int,) if kind is int else (int, float)
        return type(value) in allowed and -MAX_NUMBER < value < MAX_NUMBER
    return isinstance(value, kind)
