"""Numbers, times and counts as text for people."""

from __future__ import annotations

NBSP = "\N{NO-BREAK SPACE}"


def compact(value: float, digits: int = 3) -> str:
    """1234567 -> 1.23M, 12000 -> 12k, 0.00012 -> 1.2e-4."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.{digits}g}{letter}"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.{digits}g}"


def percent(fraction: float, digits: int = 0) -> str:
    return f"{100 * fraction:.{digits}f}{NBSP}%"


def pluralize(count: int, word: str) -> str:
    return f"{count:,}{NBSP}{word}" + ("" if count == 1 else "es" if word.endswith("s") else "s")


def format_duration(seconds: float) -> str:
    """45 s, 75 min, 3 h, 2 d: the largest unit of which there are at least two."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{NBSP}{unit}"
    return f"{max(0, seconds):.0f}{NBSP}s"
