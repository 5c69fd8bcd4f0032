"""A disk that is full or read-only, for all ranks or for one, ends a launch soon; the next one resumes bit for bit."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from disturbed_run import make_run, run_and_check
from fault_injection import mount
from fault_plan import Fault, Launch

STEPS, EVERY = 30, 5
PLAN = [
    Launch(fault=Fault("full_disk", after=7)),
    Launch(fault=Fault("read_only_disk", after=2)),
    Launch(fault=Fault("full_disk_rank", 1, after=2)),
]
WORDS = ("No space left on device", "Read-only file system", "File too large")
VERDICT_SECONDS, BUSY_SECONDS = 10.0, 10.0  # from the fault to the end of all ranks; more on a busy machine


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own with 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder))
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.skip("needs the right to mount a tmpfs: run it as root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_full_or_read_only_disk_ends_all_ranks_soon_and_the_run_resumes_bit_for_bit(shards, small_disk, tmp_path):
    run = make_run(tmp_path, shards, STEPS, EVERY, start="fork", hang_seconds=540.0)
    run = dataclasses.replace(run, folder=small_disk / "run")
    result = run_and_check(run, PLAN)
    assert result["problems"] == []
    assert result["bitwise_steps"] == STEPS and result["largest_loss_error"] == 0
    launches = result["launches"]
    assert len(launches) == len(PLAN) + 1 and all(done["fault"] for done in launches[:-1])
    for number, words in enumerate(WORDS):
        log = (small_disk / f"launch-{number + 1:03d}.log").read_text()
        assert launches[number]["ended_seconds"] < VERDICT_SECONDS + BUSY_SECONDS
        lines = [line for line in log.splitlines() if words in line]
        assert any(str(run.folder) in line for line in lines), f"{words}: no line names the file:\n{log}"
