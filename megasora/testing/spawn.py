"""A function on several ranks: processes that talk over gloo, for tests on one machine.

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
    "deepspeed.runtime.zero.muon.muon_optimizer",  # else imported by deepspeed.initialize, with the whole of inductor
]  # fmt: skip


def run_ranks(function: Callable[..., Any], processes: int, *arguments: Any, timeout: float = 240) -> list[Any]:
    """`function(*arguments)` on each rank of a new process group; what the ranks return, in their order.

    `function` must be importable. Raises RuntimeError with the traceback of the ranks that failed, or TimeoutError.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=run_rank, args=(function, rank, processes, folder, arguments), daemon=True)
            for rank in range(processes)
        ]
        for process in ranks:
            process.start()
        end = time.monotonic() + timeout
        try:
            waiting = {process.sentinel: process for process in ranks}
            while waiting and (left := end - time.monotonic()) > 0:
                for sentinel in connection.wait(waiting, left):
                    if waiting.pop(sentinel).exitcode:  # its peers may wait for it for ever
                        waiting.clear()
                        break
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error*"))]
        if errors:
            raise RuntimeError("\n".join(errors))
        if not all((Path(folder) / f"result{rank}").exists() for rank in range(processes)):
            raise TimeoutError(f"{processes} ranks have not ended in {timeout} s, or one was killed")
        return [torch.load(Path(folder) / f"result{rank}", weights_only=False) for rank in range(processes)]


def run_rank(function: Callable[..., Any], rank: int, processes: int, folder: str, arguments: tuple) -> None:
    gc.freeze()  # what was imported is not looked through again
    os.nice(10)  # many ranks, and none has a clock to keep: tests beside them do
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
    try:
        store = dist.FileStore(f"{folder}/store", processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
        result = function(*arguments)
        torch.save(result, f"{folder}/part{rank}")
        os.replace(f"{folder}/part{rank}", f"{folder}/result{rank}")
        dist.destroy_process_group()
    except BaseException:
        Path(f"{folder}/error{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)
