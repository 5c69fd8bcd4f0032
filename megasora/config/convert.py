"""Converts the letters of a setting to what its field in schema.py is: an int, a float, a bool, a text, or a list.

Texts keep their letters: `run.dir=0042` is a folder 0042, `run.dir=off` a folder off.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from functools import cache
from typing import Any

from megasora.config.field_rules import PATH
from megasora.config.yaml_text import Tree, letters
from megasora.errors import CONTROLS, MegaSoraError, printable

MAX_NUMBER, MAX_TEXT, MAX_SHOWN = 64, 4096, 60  # characters
MAX_NAME = 255  # bytes of a part of a path
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
NON_FINITE = re.compile(r"[+-]?\.?(inf|infinity|nan)", re.IGNORECASE)  # numbers that no bounds contain
BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def convert_values(schema: type, values: dict[str, Tree], prefix: str = "") -> dict[str, Any]:
    """Written values as what the fields of a section are. Raises MegaSoraError with the dotted key, or for a text in
    the wrong form. `values`: of known keys; `prefix`: the section's dotted key with a dot."""
    converted = {}
    for name, written in values.items():
        key, kind = f"{prefix}{name}", field_types(schema)[name]
        if dataclasses.is_dataclass(kind):
            converted[name] = convert_values(kind, typing.cast(dict, written), f"{key}.")
        else:
            before_path = schema.__dataclass_fields__[name].metadata.get(PATH)
            converted[name] = convert(kind, written, key, before_path)
    return converted


@cache
def field_types(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def convert(kind: Any, written: Tree, key: str, before_path: str | None) -> Any:
    """`written` as an instance of `kind`. Raises MegaSoraError with `key`, the letters, and what they must be.

    `before_path`: what a text begins with if the rest of it is a path; None: it is no path.
    """
    if typing.get_origin(kind) is list:
        if not isinstance(written, list):
            raise wrong(key, written, "a list, e.g. [a, b]")
        (item_kind,) = typing.get_args(kind)
        return [convert(item_kind, item, f"{key}[{index}]", before_path) for index, item in enumerate(written)]
    if not isinstance(written, str):
        raise wrong(key, written, "one value" if kind is not str else "text; put it in quotes")
    if "${" in written:
        raise MegaSoraError(f"{key}={shown(written)}: ${{...}} is not expanded; write the value out")
    if kind is str:
        return convert_text(written, key, before_path)
    convert_number = {int: convert_int, float: convert_float, bool: convert_bool}[kind]
    return convert_number(written, key)


def convert_int(written: str, key: str) -> int:
    """Also of 1_000 and of 1e3; not of 1.5."""
    text = number_text(written)
    if text and text.lstrip("+-").isdecimal():
        return int(text)
    value = float(text) if text else float("nan")
    if not value.is_integer():
        raise wrong(key, written, "a whole number")
    return int(value)


def convert_float(written: str, key: str) -> float:
    text = number_text(written)
    if text is None and NON_FINITE.fullmatch(written):
        text = written.replace(".", "")
    if text is None:
        raise wrong(key, written, "a number")
    return float(text)


def number_text(written: str) -> str | None:
    """The number without `_` between its digits; None if it is not one."""
    text = re.sub(r"(?<=[0-9])_(?=[0-9])", "", written) if len(written) <= MAX_NUMBER else ""
    return text if NUMBER.fullmatch(text) else None


def convert_bool(written: str, key: str) -> bool:
    if written.lower() not in BOOLS:
        raise wrong(key, written, "true or false")
    return BOOLS[written.lower()]


def convert_text(written: str, key: str, before_path: str | None) -> str:
    if len(written) > MAX_TEXT:
        raise MegaSoraError(f"{key}={shown(written)} has {len(written)} characters; at most {MAX_TEXT}")
    if control := CONTROLS.search(written):
        raise MegaSoraError(f"{key}={shown(written)} has the character U+{ord(control[0]):04X}, which is not text")
    if before_path is None or not written.startswith(before_path):
        return written
    return before_path + expand_path(written.removeprefix(before_path), f"{key}={shown(written)}")


def expand_path(path: str, setting: str) -> str:
    """The path with the home folder in place of `~` or `~user`. `setting`: begins an error."""
    if any(len(name.encode()) > MAX_NAME for name in path.split("/")):
        raise MegaSoraError(f"{setting} has a name of more than {MAX_NAME} bytes; choose a shorter one")
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise MegaSoraError(f"{setting}: there is no user {shown(path[1:].partition('/')[0])}")
    return expanded


def wrong(key: str, written: Tree, expected: str) -> MegaSoraError:
    return MegaSoraError(f"{key}={shown(written)} must be {expected}")


def shown(written: Tree) -> str:
    """The letters of a value, in one line of at most MAX_SHOWN characters."""
    return printable(letters(written), MAX_SHOWN)
