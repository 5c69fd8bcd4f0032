"""Which values of a JSON object are of the kind that a reader shows: a person may have edited the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megasora.errors import MegaSoraError
from megasora.files import read_regular_file
from megasora.jsonl import parse_json

MAX_NUMBER = 1 << 63
MAX_OBJECT = 64 << 20  # bytes


def keep_kinds(values: dict[str, Any], kinds: dict[str, type]) -> dict[str, Any]:
    """`values` without those that are not of the kind that `kinds` has for their key."""
    return {key: value for key, value in values.items() if key not in kinds or is_kind(value, kinds[key])}


def is_kind(value: Any, kind: type) -> bool:
    """Numbers are finite and less than MAX_NUMBER; an int is also a float, a bool neither."""
    if kind is int or kind is float:
        allowed = (int,) if kind is int else (int, float)
        return type(value) in allowed and -MAX_NUMBER < value < MAX_NUMBER
    return isinstance(value, kind)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} if there is no file. Raises MegaSoraError if it is not an object."""
    if not path.is_file():
        return {}
    try:
        values = parse_json(read_regular_file(path, MAX_OBJECT))
    except ValueError as error:
        raise MegaSoraError(f"{path} is not JSON: {error}; remove it or write it again") from None
    if not isinstance(values, dict):
        raise MegaSoraError(f"{path} holds a {type(values).__name__}, not an object; remove it or write it again")
    return values
