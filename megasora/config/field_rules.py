"""Rules that the field of a setting declares beside its default: the bounds of a number, and that a text is a path."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

BOUNDS, PATH = "bounds", "path"  # keys of a field's metadata


@dataclass(frozen=True)
class Exclusive:
    """An end of an interval that does not belong to it."""

    value: float


@dataclass(frozen=True)
class Bounds:
    """An interval of numbers; both ends belong to it, unless they are Exclusive."""

    low: float | Exclusive
    high: float | Exclusive

    def contain(self, value: float) -> bool:
        """False for NaN."""
        above = value > self.low.value if isinstance(self.low, Exclusive) else value >= self.low
        below = value < self.high.value if isinstance(self.high, Exclusive) else value <= self.high
        return above and below

    def __str__(self) -> str:
        low = f"above {self.low.value}" if isinstance(self.low, Exclusive) else f"at least {self.low}"
        high = f"below {self.high.value}" if isinstance(self.high, Exclusive) else f"at most {self.high}"
        return f"{low} and {high}"


def above(value: float) -> Exclusive:
    return Exclusive(value)


def below(value: float) -> Exclusive:
    return Exclusive(value)


def bounded(default: Any, low: float | Exclusive, high: float | Exclusive) -> Any:
    """A field whose number, or each number of whose list, must be within the bounds."""
    return with_rule(default, {BOUNDS: Bounds(low, high)})


def file_path(default: Any, after: str = "") -> Any:
    """A field whose text, or each text of whose list, is a path, if it begins with `after`, from there on: `~` is
    expanded."""
    return with_rule(default, {PATH: after})


def with_rule(default: Any, metadata: dict[str, Any]) -> Any:
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
