"""A node and its disk are lost: the run continues from the copy on its neighbour as if nothing had happened.

Four processes train a VideoDiT on two nodes, each with a folder as its disk; copies go over gloo while it trains.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import full_tensors, read_jsonl, train_arguments

from megasora.testing.spawn import run_ranks

STEPS, KILLED_AT = 9, 7
SETTINGS = [
    f"run.steps={STEPS}", "data.packs_per_step=4", "validation.every=100", "checkpoint.every=5",
    "checkpoint.node.every=2", "checkpoint.node.dir=$NODE_DISK/checkpoints", "parallel.zero_stage=1",
]  # fmt: skip


class Killed(Exception):
    pass


def train_on_nodes(arguments: list[str], disks: Path, per_node: int, killed_at: int = 0) -> int:
    """One launch; returns the step that it resumed from. `killed_at`: the step after which it ends without a word."""
    import torch.distributed as dist

    from megasora.config import load
    from megasora.parallel.mesh import build_mesh
    from megasora.parallel.world import World
    from megasora.tasks.dit import DiTTask
    from megasora.trainer import Trainer

    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ["NODE_DISK"] = str(disks / f"node{rank // per_node}")
    config = load(arguments[0], arguments[1:])
    world = World(rank, size, rank % per_node, per_node, torch.device("cpu"))

    def heartbeat(activity: str) -> None:
        if killed_at and activity == f"step {killed_at + 1}":
            trainer.state.saver.wait()  # the save after the step before is whole on all nodes
            raise Killed

    trainer = Trainer(config, world, DiTTask(config, world, build_mesh(config.parallel, "cpu")), heartbeat=heartbeat)
    first = trainer.step
    try:
        trainer.run()
    except Killed:
        assert trainer.step == killed_at
    return first


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_that_loses_a_node_and_its_disk_equals_the_uninterrupted_one_bit_for_bit(shards, tiny, tmp_path):
    def launch(folder: Path, processes: int, per_node: int, *settings: str, killed_at: int = 0) -> list[int]:
        arguments = [*train_arguments(folder / "run", shards, tiny), *SETTINGS, *settings]
        return run_ranks(train_on_nodes, processes, arguments, folder, per_node, killed_at)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert launch(whole, 4, 2, "checkpoint.node.dir=") == [0] * 4
    assert launch(killed, 4, 2, killed_at=KILLED_AT) == [0] * 4
    assert shared(killed) == [5]
    for node in range(2):
        assert len(list((killed / f"node{node}").rglob("rank-*.safetensors"))) == 4, "its own files and the copies"

    shutil.rmtree(killed / "node0")
    assert launch(killed, 4, 2) == [6] * 4
    assert shared(killed) == [6, 9] and not list((killed / "node1").rglob("*.safetensors"))
    assert figures(killed) == figures(whole) and len(figures(whole)) == STEPS
    tensors, others = full_tensors(killed / "run", STEPS), full_tensors(whole / "run", STEPS)
    assert tensors.keys() == others.keys()
    for name, values in others.items():
        assert torch.equal(tensors[name], values), name


def shared(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "run" / "checkpoints").glob("step-*"))


def figures(folder: Path) -> dict[int, tuple[float, float]]:
    """(loss, gradient norm) of each step, as it was trained last."""
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in read_jsonl(folder / "run")}
