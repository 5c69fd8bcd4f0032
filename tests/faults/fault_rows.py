"""Runs the tests of every row of docs/faults.md and prints the verdict on each row.

    .venv/bin/python tests/faults/fault_rows.py [ROW ...]

The table of docs/faults.md is the only list of which test proves which row. Exits with 1 if a row has failed.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "faults.md"
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@dataclass(frozen=True)
class Row:
    """A fault, and the tests that prove what must hold after it: (file, name of the function)."""

    number: int
    fault: str
    tests: tuple[tuple[str, str], ...]


def read_rows(text: str) -> list[Row]:
    return [Row(int(number), fault, tuple(TEST.findall(rest))) for number, fault, rest in ROW.findall(text)]


class Verdicts:
    """A plugin of pytest that counts the outcomes of each test function: passed, failed, skipped."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], Counter[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            file, _, name = report.nodeid.partition("::")
            self.outcomes.setdefault((file, name.partition("[")[0]), Counter())[report.outcome] += 1

    def of(self, row: Row) -> str:
        """passed, FAILED, skipped, or NOT RUN: the worst of the row's tests."""
        found = [self.outcomes.get(test, Counter()) for test in row.tests]
        if any(counts["failed"] for counts in found):
            return "FAILED"
        if not found or not all(found):
            return "NOT RUN"
        return "passed" if any(counts["passed"] for counts in found) else "skipped"


def main(numbers: list[str]) -> int:
    rows = [row for row in read_rows(TABLE.read_text(encoding="utf-8")) if not numbers or str(row.number) in numbers]
    tests = sorted({f"{file}::{name}" for row in rows for file, name in row.tests})
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    verdicts = Verdicts()
    spread = ["-n", "logical", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder"]
    pytest.main(["-q", *spread, *tests], plugins=[verdicts])
    print("\n row  verdict  tests  fault")
    for row in rows:
        print(f"{row.number:4}  {verdicts.of(row):7}  {len(row.tests):5}  {row.fault}")
    return 1 if any(verdicts.of(row) in ("FAILED", "NOT RUN") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
