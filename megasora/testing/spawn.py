"""Runs a function on several ranks of a process group over gloo, or on one rank of a fake group, for tests.

Processes are forked from a server that has imported the heavy libraries once, so that a group of eight starts in less
than a second.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = [
    "torch", "torch.distributed.pipelining", "deepspeed", "megasora.trainer", "megasora.tasks.dit",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # else imported by deepspeed.initialize, with all of torch._inductor
]  # fmt: skip


def run_ranks(function: Callable[..., Any], processes: int, *arguments: Any, timeout: float = 240) -> list[Any]:
    """Runs `function(*arguments)` on each rank of a new gloo group; returns the results of the ranks, in their order.

    `function` must be importable. Raises RuntimeError with the tracebacks of the ranks that failed, or TimeoutError
    after `timeout` seconds.
    """
    return run_processes(function, list(range(processes)), processes, "gloo", arguments, timeout)


def run_fake_rank(
    function: Callable[..., Any], rank: int, world_size: int, *arguments: Any, timeout: float = 240
) -> Any:
    """Runs `function(*arguments)` as rank `rank` of a world of `world_size` in which no other rank exists.

    Its process group is torch's fake one: a collective returns at once, as if all ranks had this rank's data, and sums
    nothing; a receive leaves its tensor as it is. Otherwise like `run_ranks`.
    """
    return run_processes(function, [rank], world_size, "fake", arguments, timeout)[0]


def run_processes(
    function: Callable[..., Any], ranks: list[int], world_size: int, backend: str, arguments: tuple, timeout: float
) -> list[Any]:
    """The results of these ranks, each run in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=run_rank, args=(function, rank, world_size, backend, folder, arguments), daemon=True)
            for rank in ranks
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        try:
            running = {process.sentinel: process for process in processes}
            while running and (seconds_left := deadline - time.monotonic()) > 0:
                for sentinel in connection.wait(running, seconds_left):
                    if running.pop(sentinel).exitcode:  # the other ranks may wait for it forever
                        running.clear()
                        break
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error*"))]
        if errors:
            raise RuntimeError("\n".join(errors))
        results = [Path(folder) / f"result{rank}" for rank in ranks]
        if not all(path.exists() for path in results):
            raise TimeoutError(f"{len(ranks)} ranks have not finished within {timeout} s, or one was killed")
        return [torch.load(path, weights_only=False) for path in results]


def run_rank(
    function: Callable[..., Any], rank: int, world_size: int, backend: str, folder: str, arguments: tuple
) -> None:
    """The body of a process: writes `folder`/result<rank>, or `folder`/error<rank> with the traceback."""
    gc.freeze()  # exempts the preloaded modules from garbage collection
    os.nice(10)  # so that tests which measure time, in the parent, are disturbed less
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    try:
        init_process_group(backend, rank, world_size, folder)
        result = function(*arguments)
        torch.save(result, f"{folder}/incomplete{rank}")
        os.replace(f"{folder}/incomplete{rank}", f"{folder}/result{rank}")
        dist.destroy_process_group()
    except BaseException:
        Path(f"{folder}/error{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)


def init_process_group(backend: str, rank: int, world_size: int, folder: str) -> None:
    if backend == "fake":
        from torch.testing._internal.distributed.fake_pg import FakeStore  # the import registers the backend

        store = FakeStore()
    else:
        store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
