"""What a process prints goes to the log file of its rank."""

from __future__ import annotations

import os

import pytest

from megasora.run_log.rank_log import redirect_output


@pytest.mark.parametrize("rank", [0, 3])
def test_output_goes_to_the_log_file_and_that_of_rank_0_also_to_the_job(rank, tmp_path, capfd):
    for word in ("once", "again"):  # the second launch appends
        with redirect_output(tmp_path, rank):
            os.write(1, f"out {word}\n".encode())
            os.write(2, f"error {word}\n".encode())
        os.write(2, b"after\n")
    text = (tmp_path / "logs" / f"rank-{rank:05d}.log").read_text()
    assert text == "out once\nerror once\nout again\nerror again\n"
    shown = capfd.readouterr().err
    assert shown == ("out once\nerror once\nafter\nout again\nerror again\nafter\n" if rank == 0 else "after\nafter\n")
