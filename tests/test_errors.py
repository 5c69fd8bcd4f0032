"""Messages and names are shown without anything that a terminal acts on."""

import re
import unicodedata

import pytest

from megasora.errors import printable

CASES = [
    ("plain name, 狐 🦊 é", "plain name, 狐 🦊 é"),
    ("no-break\xa0space, family 👨‍👩‍👧", "no-break\xa0space, family 👨‍👩‍👧"),
    ("red\x1b[31m", "red\\x1b[31m"),
    ("a\nb\tc\r", "a\\nb\\tc\\r"),
    ("\x9b2J\x7f\0", "\\x9b2J\\x7f\\x00"),
    ("gpj.\u202etxt", "gpj.\\u202etxt"),
    ("\u2066\u2028", "\\u2066\\u2028"),
    ("\ud800", "\\ud800"),
]


@pytest.mark.parametrize(("text", "shown"), CASES)
def test_controls_are_escaped_and_the_rest_remains(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


def test_every_character_of_unicode_can_be_printed_and_none_controls_the_terminal():
    shown = printable("".join(map(chr, range(0x110000))))
    shown.encode("utf-8")
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f\u061c]", shown)
