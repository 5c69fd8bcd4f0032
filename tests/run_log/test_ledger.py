"""A ledger holds the sample ids of each step once, also after an incomplete line and after a resume."""

from __future__ import annotations

import pytest

from megasora.errors import MegaSoraError
from megasora.run_log.ledger import Ledger, read_ledger, truncate_ledger


def write(run, rank, steps):
    ledger = Ledger(run, rank)
    for step in steps:
        ledger.write(step, [100 * step + rank, 100 * step + 10 + rank])
    ledger.close()


def test_a_step_has_the_sample_ids_of_all_ranks(tmp_path):
    write(tmp_path, 1, [1, 2])
    write(tmp_path, 0, [1, 2])
    assert read_ledger(tmp_path) == {1: [100, 101, 110, 111], 2: [200, 201, 210, 211]}


def test_a_run_without_a_ledger_has_no_sample_ids(tmp_path):
    truncate_ledger(tmp_path, 3)
    assert read_ledger(tmp_path) == {} and not list(tmp_path.iterdir())


def test_steps_after_the_checkpoint_are_removed_and_written_again(tmp_path):
    for rank in range(3):
        write(tmp_path, rank, [1, 2, 3])
    with open(tmp_path / "ledger" / "rank-00001.jsonl", "a") as file:
        file.write('{"step": 4, "sample_i')  # killed while it wrote
    assert sorted(read_ledger(tmp_path)) == [1, 2, 3]
    truncate_ledger(tmp_path, 2)
    assert sorted(read_ledger(tmp_path)) == [1, 2]
    write(tmp_path, 0, [3])  # one rank resumes
    sample_ids = read_ledger(tmp_path)
    assert sample_ids[3] == [300, 310] and len(sample_ids[2]) == 6


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 2, "sample_ids: [7]}',
        '{"step": "2", "sample_ids": []}',
        '{"sample_ids": []}',
        '{"step": 2, xx',
        "[{}}",
        '{"\udcff": 1}',
    ],
)
def test_a_damaged_line_is_an_error_with_its_number_and_the_file_is_unchanged(tmp_path, line):
    write(tmp_path, 0, [1])
    path = tmp_path / "ledger" / "rank-00000.jsonl"
    before = path.read_bytes() + line.encode(errors="surrogateescape") + b"\n"
    path.write_bytes(before)
    for read in (lambda: truncate_ledger(tmp_path, 1), lambda: read_ledger(tmp_path)):
        with pytest.raises(MegaSoraError, match="rank-00000.jsonl, line 2 is damaged .*; restore the file, or move it"):
            read()
    assert path.read_bytes() == before
