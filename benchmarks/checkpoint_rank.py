"""What one rank measures for benchmarks/checkpoint.py: its part of the state, saved and loaded beside plain reads and
writes of the same bytes.

Seconds are those of the slowest rank, between two barriers. In each round every variant runs once, in rotating order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megasora.checkpoint import block_file
from megasora.checkpoint.block_file import BLOCK_BYTES
from megasora.checkpoint.loader import CheckpointLoader
from megasora.checkpoint.manifest import read_manifest
from megasora.checkpoint.saver import CheckpointSaver
from megasora.checkpoint.store import CheckpointStore
from megasora.checkpoint.verify import verify_checkpoint
from megasora.fragment import Fragment
from megasora.parallel.world import World
from megasora.placement import WHOLE

KINDS = ("weights", "ema", "exp_avg", "exp_avg_sq")
Seconds = dict[str, list[float]]  # by variant: of each round


@dataclass(frozen=True)
class Sizes:
    num_bytes: int  # of the state of all ranks
    parameters: int
    rounds: int


def this_world() -> World:
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(rank, size, rank, size, torch.device("cpu"))


class State:
    """One rank's values of all kinds, in one tensor: its half (with two ranks) of each parameter."""

    def __init__(self, sizes: Sizes, world: World):
        self.count = sizes.num_bytes // (4 * len(KINDS) * sizes.parameters * world.size)  # of a parameter
        generator = torch.Generator().manual_seed(world.rank)
        self.flat = torch.rand(len(KINDS) * sizes.parameters * self.count, generator=generator)
        self.fragments, parts = [], self.flat.view(len(KINDS), sizes.parameters, self.count)
        for i in range(sizes.parameters):
            values = {kind: parts[k, i] for k, kind in enumerate(KINDS)}
            shape, start = torch.Size((self.count * world.size,)), self.count * world.rank
            self.fragments.append(Fragment(f"parameter.{i:03d}", shape, WHOLE, 0, 1, start, values))

    @property
    def num_bytes(self) -> int:
        return 4 * self.flat.numel()


def timed(action: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    action()
    slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def run_rounds(variants: dict[str, Callable[[], dict[str, float]]], rounds: int) -> tuple[Seconds, Seconds]:
    """(the first round, which is warming up, the others). A variant returns its seconds by name."""
    first: Seconds = {}
    rest: Seconds = {}
    for number in range(rounds + 1):
        order = list(variants)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            for key, seconds in variants[name]().items():
                (rest if number else first).setdefault(key, []).append(seconds)
    return first, rest


# ---------------------------------------------------------------- saving


@contextmanager
def without_hashing() -> Iterator[None]:
    """The same writer and thread, with digests that cost nothing."""

    class NoHash:
        def __init__(self, data: object = b""):
            pass

        def update(self, data: object) -> None:
            pass

        def digest(self) -> bytes:
            return bytes(block_file.DIGEST_BYTES)

    with mock.patch.object(block_file, "blake3", mock.Mock(blake3=NoHash)):
        yield


def write_sequentially(path: Path, flat: Tensor, starts_writeback: bool = False) -> None:
    """In blocks of the size that the product writes, then fsync. `starts_writeback`: after each block the kernel is
    asked to begin with writing it to the disk."""
    view = memoryview(flat.numpy()).cast("B")
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(view), BLOCK_BYTES):
            block = view[start : start + BLOCK_BYTES]
            while block:
                block = block[file.write(block) :]
            if starts_writeback:
                os.posix_fadvise(file.fileno(), start, BLOCK_BYTES, os.POSIX_FADV_DONTNEED)
        os.fsync(file.fileno())


def measure_saves(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Seconds of saves, and of a copy and a write of the same bytes."""
    world = this_world()
    state, store = State(sizes, world), CheckpointStore(folder / "saves")
    target, raw = torch.zeros_like(state.flat), folder / f"raw-{world.rank}"
    blocking, asynchronous = (
        CheckpointSaver(store, state.fragments, lambda _: (0, 1), world, asynchronous=flag) for flag in (False, True)
    )

    def removed(seconds: dict[str, float]) -> dict[str, float]:
        """So that every variant begins with the same disk."""
        if world.is_main:
            store.delete(store.path(1))
        raw.unlink(missing_ok=True)
        os.sync()
        dist.barrier()
        return seconds

    def save_asynchronously() -> dict[str, float]:
        copy = timed(lambda: target.copy_(state.flat))
        stall = timed(lambda: asynchronous.save(1, {}))
        return removed({"copy": copy, "stall": stall, "asynchronous save": stall + timed(asynchronous.wait)})

    def save() -> dict[str, float]:
        return removed({"save": timed(lambda: blocking.save(1, {}))})

    def save_without_hashing() -> dict[str, float]:
        with without_hashing():
            return removed({"save without hashing": timed(lambda: blocking.save(1, {}))})

    def write() -> dict[str, float]:
        return removed({"write + fsync": timed(lambda: write_sequentially(raw, state.flat))})

    def write_early() -> dict[str, float]:
        return removed({"write, early writeback": timed(lambda: write_sequentially(raw, state.flat, True))})

    variants = {f.__name__: f for f in (save_asynchronously, write, save, save_without_hashing, write_early)}
    first, rest = run_rounds(variants, sizes.rounds)
    return {"num_bytes": state.num_bytes * world.size, "first": first, "seconds": rest}


# ---------------------------------------------------------------- loading


def drop_from_page_cache(files: list[Path]) -> None:
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def read_sequentially(files: list[Path], out: Tensor | None = None) -> None:
    """In blocks of the size that the product reads, into one block of memory, or into `out` if it is given."""
    view = None if out is None else memoryview(out.numpy()).cast("B")
    block, position = memoryview(bytearray(BLOCK_BYTES)), 0
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while True:
                into = block if view is None else view[position % len(view) :][:BLOCK_BYTES]
                count = file.readinto(into)
                if not count:
                    break
                position += count


def measure_loads(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Seconds of `verify` by one process and of a load by all, and of a sequential read of the same files."""
    world = this_world()
    state, store = State(sizes, world), CheckpointStore(folder / "loads")
    CheckpointSaver(store, state.fragments, lambda _: (0, 1), world).save(1, {})
    checkpoint, expected = store.path(1), state.flat.clone()
    digest, files = read_manifest(checkpoint).digest, sorted(checkpoint.glob("fragments/*"))
    own, loader = files[world.rank : world.rank + 1], CheckpointLoader(store, state.fragments, world)

    def on_main(action: Callable[[], object]) -> Callable[[], object]:
        return action if world.is_main else lambda: None

    actions = {
        "read by one process": on_main(lambda: read_sequentially(files)),
        "verify": on_main(lambda: verify_checkpoint(checkpoint)),
        "read by all processes": lambda: read_sequentially(own, state.flat),
        "load": lambda: loader.load(checkpoint.name, digest),
    }

    def variant(name: str, is_cold: bool) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            if is_cold and world.is_main:
                drop_from_page_cache(files)
            seconds = timed(actions[name])
            return {f"{name}, {'cold' if is_cold else 'warm'}": seconds}

        return run

    variants = {f"{name} {is_cold}": variant(name, is_cold) for is_cold in (True, False) for name in actions}
    first, rest = run_rounds(variants, sizes.rounds)
    actions["load"]()
    assert torch.equal(state.flat, expected), "the load has changed the values"
    return {"num_bytes": sum(path.stat().st_size for path in files), "first": first, "seconds": rest}
