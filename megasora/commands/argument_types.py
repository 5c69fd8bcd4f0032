"""Types of command line arguments: each makes a value of a word, or raises ArgumentTypeError with what it must be."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from pathlib import Path

from megasora.config.convert import convert_float, convert_int, convert_text
from megasora.errors import MegaSoraError, printable

WEIGHTS = re.compile(r"raw|ema|ema_(?:sigma_)?[0-9][0-9.e-]{0,30}", re.ASCII)  # kinds of megasora/optim/ema_decays.py


def whole_number(text: str) -> int:
    try:
        return convert_int(text, "value")
    except MegaSoraError as error:
        raise ArgumentTypeError(str(error)) from None


def number(text: str) -> float:
    """Also NaN and infinity: the command has bounds."""
    try:
        return convert_float(text, "value")
    except MegaSoraError as error:
        raise ArgumentTypeError(str(error)) from None


def location(text: str) -> str:
    """A path with `~` expanded, or a URL."""
    try:
        expanded = convert_text(text, "path", "")
    except MegaSoraError as error:
        raise ArgumentTypeError(str(error)) from None
    if not expanded:
        raise ArgumentTypeError("the path is empty")
    return expanded


def path(text: str) -> Path:
    return Path(location(text))


def weights(text: str) -> str:
    """What `--weights` names: raw, or an average, which the checkpoint must have."""
    if not WEIGHTS.fullmatch(text):
        raise ArgumentTypeError(f"{printable(text, 60)} must be raw, ema, or another average, e.g. ema_0.999")
    return text
