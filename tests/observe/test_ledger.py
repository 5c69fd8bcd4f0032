"""A ledger holds what each step was trained on, once, whatever was torn or written beyond a checkpoint."""

from __future__ import annotations

from megasora.observe.ledger import Ledger, cut_ledger, read_ledger


def write(run, rank, steps):
    ledger = Ledger(run, rank)
    for step in steps:
        ledger.write(step, [100 * step + rank, 100 * step + 10 + rank])
    ledger.close()


def test_lines_of_all_ranks_make_a_step(tmp_path):
    write(tmp_path, 1, [1, 2])
    write(tmp_path, 0, [1, 2])
    assert read_ledger(tmp_path) == {1: [100, 101, 110, 111], 2: [200, 201, 210, 211]}


def test_a_run_without_a_ledger_has_none(tmp_path):
    cut_ledger(tmp_path, 3)
    assert read_ledger(tmp_path) == {} and not list(tmp_path.iterdir())


def test_what_was_written_after_the_checkpoint_is_written_again_and_counts_once(tmp_path):
    for rank in range(3):
        write(tmp_path, rank, [1, 2, 3])
    with open(tmp_path / "ledger" / "rank-00001.jsonl", "a") as file:
        file.write('{"step": 4, "sample_i')  # a kill in mid-line
    assert sorted(read_ledger(tmp_path)) == [1, 2, 3]
    cut_ledger(tmp_path, 2)
    assert sorted(read_ledger(tmp_path)) == [1, 2]
    write(tmp_path, 0, [3])  # one rank goes on
    found = read_ledger(tmp_path)
    assert found[3] == [300, 310] and len(found[2]) == 6
