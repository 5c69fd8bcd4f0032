"""Ranks whose collectives do not match wait for each other for ever: the watchdog ends them and says what each did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megasora.errors import HANG
from megasora.run_log.launches import Launch, read_exit
from megasora.testing.spawn import run_ranks
from megasora.watchdog import Watchdog


def wait_in_different_collectives(run: str) -> None:
    """Rank 0 sums over all ranks at its step 2, rank 1 waits at the barrier of a save: neither returns."""
    launch = Launch(Path(run), dist.get_rank())
    ids = [launch.id]
    dist.broadcast_object_list(ids)
    launch.id = ids[0]
    if launch.rank == 0:
        launch.begin(processes=2)
    dist.barrier()
    watchdog = Watchdog(launch, 2, 1.0, lambda: False)
    with watchdog.watching():
        watchdog.begin("step 1")
        dist.barrier()
        if launch.rank == 0:
            watchdog.heartbeat("step 2")
            dist.all_reduce(torch.ones(4))
        else:
            watchdog.heartbeat("the save after step 1")
            dist.barrier()


def test_a_mismatched_collective_ends_both_ranks_and_names_what_each_was_doing(tmp_path):
    (tmp_path / "logs").mkdir()
    with pytest.raises(TimeoutError, match="one was killed"):
        run_ranks(wait_in_different_collectives, 2, str(tmp_path), timeout=60)
    recorded = read_exit(tmp_path)
    assert recorded["code"] == HANG
    assert recorded["reason"].startswith("no heartbeat for 1 s; ")
    for words in ("process 0: step 2", "process 1: the save after step 1"):
        assert words in recorded["reason"]
