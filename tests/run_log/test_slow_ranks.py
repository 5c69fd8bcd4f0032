"""A rank that is slower than the others is named within 20 steps, once, and again when it has recovered."""

from __future__ import annotations

import json
import statistics
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megasora.run_log.slow_ranks import SLOW_RANKS, SlowRanks, medians_of_others
from megasora.testing.spawn import run_ranks


def finder(tmp_path, size: int) -> SlowRanks:
    slow = SlowRanks(tmp_path, 0, size, [f"node{rank // 2}" for rank in range(size)])
    slow.record({"data": 0.1, "forward": 0.3, "backward": 0.6, "step": 1.0})
    return slow


def feed(slow: SlowRanks, steps: range, factors: list[float], rng: np.random.Generator) -> dict[int, str]:
    """Messages by step; rank r needs 0.4 s times its factor, give or take 20 %."""
    messages = {}
    for step in steps:
        seconds = 0.4 * np.asarray(factors) * rng.uniform(0.8, 1.2, len(factors))
        slow.update(step, seconds.tolist())
        if slow.change is not None:
            messages[step] = slow.change
    return messages


@pytest.mark.parametrize("size, rank", [(2, 1), (2, 0), (4, 3), (1024, 700)])
def test_a_rank_five_times_slower_is_named_within_20_steps_and_once(size, rank, tmp_path):
    slow, rng = finder(tmp_path, size), np.random.default_rng(0)
    assert feed(slow, range(1, 101), [1.0] * size, rng) == {}
    messages = feed(slow, range(101, 161), [5.0 if r == rank else 1.0 for r in range(size)], rng)
    ((step, message),) = messages.items()
    assert step <= 120
    assert message.startswith(f"slow: process {rank} on node{rank // 2}: ") and "x slower than the others" in message
    ratio = float(message.split(": ")[2].split("x")[0])
    assert 3.5 < ratio < 6.5
    messages = feed(slow, range(161, 221), [1.0] * size, rng)
    ((step, message),) = messages.items()
    assert step <= 180 and message == "no process is slower than the others any more"
    lines = [json.loads(line) for line in (tmp_path / SLOW_RANKS).read_text().splitlines()]
    assert [line["ranks"] for line in lines] == [[rank], []] and lines[0]["hosts"] == [f"node{rank // 2}"]
    assert lines[0]["seconds"][0] / lines[0]["others"][0] == pytest.approx(ratio, abs=0.06)


def test_a_slow_group_of_ranks_is_named_together(tmp_path):
    messages = feed(finder(tmp_path, 8), range(1, 30), [3.0, 3.0] + [1.0] * 6, np.random.default_rng(1))
    (message,) = messages.values()
    assert message.startswith("slow: process 0 on node0, 1 on node0: ")


def test_single_slow_steps_and_times_that_hardly_count_are_not_named(tmp_path):
    slow, rng = finder(tmp_path, 2), np.random.default_rng(2)
    for step in range(1, 100):
        slow.update(step, [0.4, 4.0 if step % 3 == 0 else 0.4])
        assert slow.change is None
    quick = finder(tmp_path, 2)
    quick.record({"data": 0.001, "step": 1.0})
    assert feed(quick, range(1, 40), [0.01, 0.05], rng) == {}  # 16 ms of a step of 1 s
    other = SlowRanks(tmp_path, 1, 2, None)  # not the main process
    assert feed(other, range(1, 40), [1.0, 5.0], rng) == {} and not list(tmp_path.iterdir())


def test_a_rank_adds_its_own_seconds_in_its_slot(tmp_path):
    slow = SlowRanks(tmp_path, 2, 4, None)
    slow.record({"data": 0.25, "forward": 0.5, "backward": 8.0, "optimizer": 8.0, "step": 16.75})
    assert slow.slots().tolist() == [0, 0, 0.75, 0]


@pytest.mark.parametrize("n", range(2, 9))
def test_the_median_of_the_others_leaves_out_one_value(n):
    values = np.random.default_rng(n).integers(0, 5, n).astype(float)
    expected = [statistics.median(np.delete(values, i)) for i in range(n)]
    assert medians_of_others(values).tolist() == expected


def train_with_a_slow_rank(settings, where):
    """A run on two data ranks of which rank 1 waits in each step, 0.1 s in its forward passes or 0.4 s in its loader,
    which hides as much of it as a step takes."""
    from megasora.config import load
    from megasora.parallel.mesh import build_mesh
    from megasora.parallel.world import World
    from megasora.tasks.dit import DiTTask
    from megasora.trainer import Trainer

    config, rank = load(None, settings), dist.get_rank()
    world = World(rank, 2, rank, 2, torch.device("cpu"))
    task = DiTTask(config, world, build_mesh(config.parallel, "cpu"))
    if rank == 1 and where == "forward":
        task.engine.module.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    elif rank == 1:
        share = task.share
        task.share = lambda *arguments: (time.sleep(0.4), share(*arguments))[1]
    Trainer(config, world, task).run()


@pytest.mark.parametrize("where", ["data", "forward"])
def test_a_run_names_its_slow_rank(where, shards, tiny, tmp_path):
    settings = [
        *tiny, f"data.shards={shards}", "run.device=cpu", "run.steps=24", f"run.dir={tmp_path}", "validation.clips=1",
        "validation.bins=1", "checkpoint.every=100", "validation.every=100",
    ]  # fmt: skip
    run_ranks(train_with_a_slow_rank, 2, settings, where)
    lines = [json.loads(line) for line in (tmp_path / SLOW_RANKS).read_text().splitlines()]
    assert lines and lines[-1]["ranks"] == [1] and lines[0]["step"] <= 21
    assert lines[-1]["seconds"][0] > 0.1 and lines[-1]["seconds"][0] > 1.5 * lines[-1]["others"][0]
