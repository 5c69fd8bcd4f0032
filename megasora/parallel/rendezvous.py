"""Where the processes of a launch meet: a store of keys, at torchrun or in process 0, before a process group exists.

Every process writes `joined/RANK` as soon as it reaches the store. While the others wait for one that does not come,
the watchdog reads these keys over a connection of its own, and names it.
"""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist

from megasora.errors import MegaSoraError, first_of
from megasora.parallel.launcher import REMEDY, Launcher

PREFIX = "megasora"
MAX_NAMED = 8
TORCHRUN_SECONDS = 10.0  # torchrun listens before it starts a process
BY_HAND_SECONDS = 20.0  # without torchrun, all processes must have been started within this time
QUERY_SECONDS = 1.0


class Rendezvous:
    """The store of a launch. `hang_seconds`: the longest wait of a process for the others."""

    def __init__(self, launcher: Launcher, hang_seconds: float):
        self.launcher, self.hang_seconds = launcher, hang_seconds
        self.join_seconds = hang_seconds if launcher.is_torchrun else min(hang_seconds, BY_HAND_SECONDS)

    def join(self) -> dist.Store:
        """The store, for `init_process_group`, once all processes have reached it; of a process alone, its own.

        Raises MegaSoraError if nothing listens at the meeting point, or a process that no torchrun has started does not
        come.
        """
        if self.launcher.size == 1:
            return dist.HashStore()
        store = dist.PrefixStore(PREFIX, self.connect())
        store.set(f"joined/{self.launcher.rank}", "")
        if not self.launcher.is_torchrun:
            self.wait_by_hand(store)
        return store

    def connect(self) -> dist.TCPStore:
        seconds = min(self.join_seconds, TORCHRUN_SECONDS) if self.launcher.is_torchrun else self.join_seconds
        is_server = self.launcher.is_main and not self.launcher.is_torchrun
        try:
            return dist.TCPStore(
                self.launcher.address, self.launcher.port, self.launcher.size, is_server, timedelta(seconds=seconds),
                wait_for_workers=False,
            )  # fmt: skip
        except RuntimeError as error:
            what = "cannot be listened at" if is_server else "cannot be reached"
            raise MegaSoraError(
                f"MASTER_ADDR={self.launcher.address} MASTER_PORT={self.launcher.port} {what} "
                f"({first_line(error)}); {REMEDY}"
            ) from None

    def wait_by_hand(self, store: dist.Store) -> None:
        """Waits for all processes: variables that were left in the environment look like a launch with one of them."""
        deadline = time.monotonic() + self.join_seconds
        while absent := absent_ranks(store, self.launcher.size):
            if time.monotonic() > deadline:
                raise MegaSoraError(
                    f"WORLD_SIZE={self.launcher.size} is set in the environment, but within {self.join_seconds:.0f} s "
                    f"{list_ranks(absent)} has not joined; {REMEDY}"
                )
            time.sleep(0.1)

    def describe_absent(self) -> str:
        """The processes that have not joined, e.g. "process 1, 5 of 8 has not joined"; "" if all have."""
        if self.launcher.size == 1:
            return ""
        try:
            store = dist.TCPStore(
                self.launcher.address, self.launcher.port, is_master=False,
                timeout=timedelta(seconds=QUERY_SECONDS), wait_for_workers=False,
            )  # fmt: skip
            absent = absent_ranks(dist.PrefixStore(PREFIX, store), self.launcher.size)
        except RuntimeError:
            return f"nothing answers at {self.launcher.meeting_point}, where the processes meet"
        return f"{list_ranks(absent)} of {self.launcher.size} has not joined" if absent else ""


def absent_ranks(store: dist.Store, size: int) -> list[int]:
    """The ranks that have not reached the store."""
    if store.check([f"joined/{rank}" for rank in range(size)]):
        return []
    return [rank for rank in range(size) if not store.check([f"joined/{rank}"])]


def list_ranks(ranks: list[int]) -> str:
    """E.g. "process 1, 5 and 7 more"."""
    return f"process {first_of(ranks, MAX_NAMED)}"


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
