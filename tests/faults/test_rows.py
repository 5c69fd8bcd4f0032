"""docs/faults.md has a row for each of the 26 faults, and each row names tests that exist."""

from __future__ import annotations

import ast
from collections import Counter

from fault_rows import ROOT, TABLE, Row, Verdicts, read_rows

ROWS = read_rows(TABLE.read_text(encoding="utf-8"))


def test_there_are_26_rows_in_order_and_each_names_a_test():
    assert [row.number for row in ROWS] == list(range(1, 27))
    assert not [row.number for row in ROWS if not row.tests]


def test_every_test_of_the_table_exists():
    missing = []
    for file in {file for row in ROWS for file, _ in row.tests}:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8")) if (ROOT / file).is_file() else ast.Module([], [])
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        named = {name for row in ROWS for other, name in row.tests if other == file}
        missing += [f"{file}::{name}" for name in sorted(named - defined)]
    assert missing == []


def test_a_row_has_the_worst_verdict_of_its_tests():
    verdicts, row = Verdicts(), Row(1, "a fault", (("tests/a.py", "test_a"), ("tests/b.py", "test_b")))
    assert verdicts.of(row) == "NOT RUN"
    verdicts.outcomes[("tests/a.py", "test_a")] = Counter(passed=2)
    assert verdicts.of(row) == "NOT RUN"
    verdicts.outcomes[("tests/b.py", "test_b")] = Counter(skipped=1)
    assert verdicts.of(row) == "passed"
    verdicts.outcomes[("tests/b.py", "test_b")] = Counter(passed=3, failed=1)
    assert verdicts.of(row) == "FAILED"
