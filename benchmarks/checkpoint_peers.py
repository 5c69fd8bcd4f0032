"""torch.distributed.checkpoint and DeepSpeed, as benchmarks/checkpoint.py measures them, on one rank.

Both get what MegaSora gets: torch.distributed.checkpoint the same tensors as DTensors, DeepSpeed an engine of as many
parameters, of which it saves bf16 weights, fp32 master weights and both moments (14 bytes a parameter; MegaSora, with
the EMA, 16). DeepSpeed does not flush its files; the time until they are on the disk has an fsync of each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.checkpoint_rank import KINDS, Sizes, State, run_rounds, this_world, timed
from megasora.checkpoint.saver import CheckpointSaver
from megasora.checkpoint.store import CheckpointStore
from megasora.files import sync
from megasora.fragment import Fragment
from megasora.parallel.deepspeed_engine import import_deepspeed

ON_CPU = StagingOptions(
    use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Scratch:
    """A folder for one save, removed after it; the bytes of the last one."""

    def __init__(self, folder: Path):
        self.folder, self.num_bytes = folder, 0

    def clear(self) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            self.num_bytes = folder_bytes(self.folder)
            shutil.rmtree(self.folder)
        os.sync()
        dist.barrier()


def own_tensors(fragments: list[Fragment]) -> list[Fragment]:
    """With values that are tensors of their own: async_save of torch 2.13 fails on views of one."""
    return [dataclasses.replace(f, values={kind: x.clone() for kind, x in f.values.items()}) for f in fragments]


def measure_dcp(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Stalls and seconds until the files are on the disk of MegaSora and of torch.distributed.checkpoint, in turn."""
    world, scratch = this_world(), Scratch(folder / "dcp")
    fragments, store = own_tensors(State(sizes, world).fragments), CheckpointStore(folder / "dcp-megasora")
    mesh = init_device_mesh("cpu", (world.size,))
    tensors = {
        f"{kind}/{f.name}": DTensor.from_local(values, mesh, [Shard(0)], run_check=False)
        for f in fragments
        for kind, values in f.values.items()
    }
    saver = CheckpointSaver(store, fragments, lambda _: (0, 1), world, asynchronous=True)
    stager = DefaultStager(ON_CPU)

    def megasora() -> dict[str, float]:
        stall = timed(lambda: saver.save(1, {}))
        seconds = {"MegaSora, stall": stall, "MegaSora, on disk": stall + timed(saver.wait)}
        if world.is_main:
            store.delete(store.path(1))
        os.sync()
        return seconds

    def asynchronous(name: str, **options: Any) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            dist.barrier()
            start = time.perf_counter()
            future = dcp.async_save(tensors, checkpoint_id=scratch.folder, **options)
            stall = time.perf_counter() - start
            future.result()  # before the next collective: its thread uses the same process group
            slowest = torch.tensor([stall, time.perf_counter() - start], dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            seconds = dict(zip((f"{name}, stall", f"{name}, on disk"), slowest.tolist(), strict=True))
            scratch.clear()
            return seconds

        return run

    def blocking() -> dict[str, float]:
        seconds = timed(lambda: dcp.save(tensors, checkpoint_id=scratch.folder))
        scratch.clear()
        return {"DCP save, stall": seconds, "DCP save, on disk": seconds}

    variants = {
        "megasora": megasora,
        "async": asynchronous("DCP async_save"),
        "staged": asynchronous("DCP async_save, stager kept", async_stager=stager),
        "save": blocking,
    }
    first, rest = run_rounds(variants, sizes.rounds)
    stager.close()
    return {"first": first, "seconds": rest, "num_bytes": scratch.num_bytes}


def build_engine(sizes: Sizes, stage: int) -> Any:
    """An engine after one step, so that it has moments."""
    deepspeed, count = import_deepspeed(), sizes.num_bytes // (4 * len(KINDS) * sizes.parameters)
    model = nn.ParameterList([nn.Parameter(torch.zeros(count)) for _ in range(sizes.parameters)])
    settings = {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True, "steps_per_print": 1 << 60,
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.AdamW(model.parameters()), config=settings, dist_init_required=False
        )
    engine.backward(sum(parameter.sum() for parameter in engine.module))
    engine.step()
    return engine


def measure_deepspeed(sizes: Sizes, folder: Path, stage: int) -> dict[str, Any]:
    """Of `save_checkpoint`: the stall, which is all of it, and until its files are flushed."""
    engine, scratch, name = build_engine(sizes, stage), Scratch(folder / "deepspeed"), f"DeepSpeed, ZeRO {stage}"

    def save() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            engine.save_checkpoint(str(scratch.folder), tag="saved")

    def flush() -> None:
        for path in scratch.folder.rglob("*"):
            if path.is_file():
                sync(path)

    def run() -> dict[str, float]:
        stall = timed(save)
        seconds = {f"{name}, stall": stall, f"{name}, on disk": stall + timed(flush)}
        scratch.clear()
        return seconds

    first, rest = run_rounds({"save": run}, sizes.rounds)
    return {"first": first, "seconds": rest, "num_bytes": scratch.num_bytes}
