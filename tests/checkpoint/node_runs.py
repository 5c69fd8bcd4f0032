"""Launches whose ranks are threads and whose nodes are folders, for the tests of checkpoints on the disks of nodes."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from saved_runs import ThreadRank

from megasora.checkpoint.run_checkpoints import RunCheckpoints
from megasora.config.schema import CheckpointConfig, NodeCheckpointConfig
from megasora.fragment import Fragment
from megasora.placement import Placement

COUNT = 24  # elements of the parameter; divisible by the numbers of ranks
KINDS = ("weights", "exp_avg")
SECONDS = 30


class Meeting:
    """What the threads of a launch share."""

    def __init__(self, size: int):
        self.barrier, self.slots = threading.Barrier(size, timeout=SECONDS), [None] * size
        self.queues: dict[tuple, queue.Queue] = {}
        self.lock = threading.Lock()

    def queue(self, key: tuple) -> queue.Queue:
        with self.lock:
            return self.queues.setdefault(key, queue.Queue(maxsize=1))


class QueueChannel:
    """`megasora.parallel.channel.Channel` between threads: a send waits until the one before is received."""

    def __init__(self, messages: queue.Queue):
        self.messages = messages

    def send(self, data: torch.Tensor) -> None:
        self.messages.put(data.clone(), timeout=SECONDS)

    def receive(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        data = self.messages.get(timeout=SECONDS)
        assert data.shape == (count,) and data.dtype == dtype
        return data


class NodeRank(ThreadRank):
    """A rank of a launch, of a node with `sizes[node number]` of them."""

    def __init__(self, rank: int, sizes: Sequence[int], meeting: Meeting):
        super().__init__(rank, meeting.slots, meeting.barrier)
        self.size, self.queue = sum(sizes), meeting.queue
        self.number = next(k for k in range(len(sizes)) if rank < sum(sizes[: k + 1]))
        self.node, self.local_size = sum(sizes[: self.number]), sizes[self.number]
        self.local_rank = rank - self.node

    def share_on_node(self, make: Callable[[], Any]) -> Any:
        return self.exchange(make() if self.local_rank == 0 else None)[self.node]

    def gather_on_node(self, value: object) -> list | None:
        values = self.exchange(value)[self.node : self.node + self.local_size]
        return values if self.local_rank == 0 else None

    def open_channel(self, name: str, sender: int, receiver: int, rank: int) -> QueueChannel:
        assert rank == self.rank and rank in (sender, receiver)
        return QueueChannel(self.queue((name, sender, receiver)))


class Disks:
    """The run folder and the disks of the nodes below `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.run_dir = folder, folder / "run"
        self.run_dir.mkdir(parents=True, exist_ok=True)

    def node(self, number: int) -> Path:
        return self.folder / f"node{number}"

    def lose(self, *numbers: int) -> None:
        for number in numbers:
            shutil.rmtree(self.node(number))

    def files(self, number: int, pattern: str = "*") -> list[Path]:
        """Files of parts on a node, without folders."""
        return sorted(path for path in self.node(number).rglob(pattern) if path.is_file())

    def shared(self) -> list[str]:
        return sorted(path.name for path in (self.run_dir / "checkpoints").glob("step-*"))

    def contents(self, step: int) -> dict[str, bytes]:
        """Of a checkpoint in the run folder."""
        folder = self.run_dir / "checkpoints" / f"step-{step:08d}"
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fragments(rank: int, size: int, step: float) -> list[Fragment]:
    """One of `size` equal shares of a parameter whose elements are step + index / 100, and another kind of it."""
    share = COUNT // size
    weights = step + torch.arange(share * rank, share * (rank + 1)) / 100
    values = dict(zip(KINDS, (weights, -weights), strict=True))
    return [Fragment("weight", torch.Size([COUNT]), Placement(), 0, 1, share * rank, values)]


def set_values(checkpoints: RunCheckpoints, step: float) -> None:
    ranks = checkpoints.ranks
    for kind, values in fragments(ranks.rank, ranks.size, step)[0].values.items():
        checkpoints.saver.fragments[0].values[kind].copy_(values)


def has_values(checkpoints: RunCheckpoints, step: float) -> bool:
    ranks = checkpoints.ranks
    expected = fragments(ranks.rank, ranks.size, step)[0].values
    return all(torch.equal(checkpoints.saver.fragments[0].values[kind], expected[kind]) for kind in KINDS)


def save(checkpoints: RunCheckpoints, *steps: int) -> None:
    """Trains and saves after these steps, where it is due, and waits for each."""
    for step in steps:
        set_values(checkpoints, step)
        checkpoints.save_if_due(step, False, lambda s=step: {"tag": f"of {s}"})
        set_values(checkpoints, -7)
        checkpoints.saver.wait()


def rank_checkpoints(rank: NodeRank, disks: Disks, settings: dict[str, Any]) -> RunCheckpoints:
    node = {"dir": str(disks.node(rank.number)), "every": 10, **settings.get("node", {})}
    node["dir"] = node["dir"](rank.number) if callable(node["dir"]) else node["dir"]
    others = {key: value for key, value in settings.items() if key != "node"}
    config = CheckpointConfig(**{"every": 100, **others}, node=NodeCheckpointConfig(**node))
    own = fragments(rank.rank, rank.size, -1.0)
    open_channel, nothing = rank.open_channel, frozenset[str]()
    return RunCheckpoints(
        disks.run_dir, config, own, lambda f: (0, 1), nothing, rank, open_channel, lambda activity: None
    )


def launch(
    disks: Disks,
    sizes: Sequence[int],
    *steps: int,
    start: str = "resume-or-fresh",
    action: Callable[[RunCheckpoints], None] = lambda checkpoints: None,
    **settings: Any,
) -> int:
    """A launch on nodes with so many ranks each: resumes, saves after `steps`, calls `action` and ends without a word,
    as a killed one does. Returns the step that it resumed from, 0 for none; raises what the ranks raise, the same."""
    meeting, results = Meeting(sum(sizes)), [None] * sum(sizes)

    def run(number: int) -> None:
        try:
            rank = NodeRank(number, sizes, meeting)
            checkpoints = rank_checkpoints(rank, disks, settings)
            state = checkpoints.resume(start)
            step = 0 if state is None else state["step"]
            assert state is None or (has_values(checkpoints, step) and state["tag"] == f"of {step}")
            save(checkpoints, *steps)
            action(checkpoints)
            if checkpoints.node is not None and rank.local_rank == 0:
                checkpoints.node.wait_for_deletion()
            results[number] = step
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(sum(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [result for result in results if isinstance(result, Exception)]
    if errors:
        broken = [error for error in errors if isinstance(error, threading.BrokenBarrierError)]
        others = [error for error in errors if error not in broken]
        assert len({str(error) for error in others}) == 1 and len(errors) == len(results), results
        raise others[0]
    assert len(set(results)) == 1, results
    return results[0]
