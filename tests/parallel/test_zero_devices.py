"""ZeroEngine on GPUs: a step without a wait of the host, and reductions that overlap the backward pass, over NCCL.

The same runs over gloo on CPUs, where nothing waits and nothing overlaps.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megasora.config import load
from megasora.optim.ema import ShardedEMA
from megasora.optim.ema_decays import constant_decay
from megasora.optim.update import Update
from megasora.parallel.deepspeed_engine import BUCKET_ELEMENTS, bucket_elements
from megasora.parallel.mesh import build_mesh
from megasora.parallel.world import World
from megasora.parallel.zero import ZeroEngine
from megasora.placement import Placement
from megasora.testing.spawn import run_processes

WIDTH, LAYERS, STEPS, PACKS = 128, 6, 4, 4


def gpus(count):
    return pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} GPU(s)")


def devices(count):
    return [pytest.param("gloo", id="cpu"), pytest.param("nccl", id="gpu", marks=gpus(count))]


def build_engine(stage, device):
    """An engine of a small network in bf16, the same on all ranks, and averages of its weights."""
    settings = [f"parallel.zero_stage={stage}", f"data.packs_per_step={PACKS}"]
    config, rank, size = load(None, settings), dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).bfloat16()
    placements = {name: Placement() for name, _ in module.named_parameters()}
    world, mesh = World(rank, size, rank, size, device), build_mesh(config.parallel, device.type)
    decays = lambda name, parameter: parameter.ndim > 1  # noqa: E731
    engine = ZeroEngine({0: module}, placements, decays, config, world, mesh, torch.bfloat16)
    return engine, ShardedEMA([f.values["weights"] for f in engine.fragments()], {"ema": constant_decay(0.9)})


def device_of(backend):
    """Of this rank, as a launcher sets it."""
    if backend == "gloo":
        return torch.device("cpu")
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    torch.cuda.set_device(dist.get_rank())
    return torch.device("cuda", dist.get_rank())


def take_step(engine, ema, packs, number):
    mine = packs[engine.mesh.data.rank :: engine.mesh.data.size]
    norm = engine.forward_backward(mine, lambda y, index: y.float().square().mean() / PACKS)
    update = Update(1e-3, number, norm < 1e6, ema)
    engine.optimizer_step(update)
    ema.update(update)
    ema.updates += 1


def packs_of(device, step):
    draw = torch.Generator().manual_seed(step)
    return [torch.randn(64, WIDTH, generator=draw).to(device, torch.bfloat16) for _ in range(PACKS)]


def train(backend):
    """{ZeRO stage: weights, moments and averages of this rank after the last step}"""
    device, results = device_of(backend), {}
    for stage in (1, 2):
        engine, ema = build_engine(stage, device)
        for step in range(STEPS):
            take_step(engine, ema, packs_of(device, step), step)
        fragments = [x.cpu().clone() for f in ema.extend(engine.fragments()) for x in f.values.values()]
        results[stage] = [*fragments, *(w.detach().cpu() for w in engine.compute_weights().values())]
    return results


@pytest.mark.parametrize("backend", devices(2))
def test_sums_of_two_ranks_are_the_same_during_the_backward_pass_and_after_it(backend):
    """Stage 2 reduces buckets while gradients are computed, stage 1 afterwards: sums of two numbers have one order."""
    for rank in run_processes(train, [0, 1], 2, backend, (backend,), 240):
        assert all(torch.equal(a, b) for a, b in zip(rank[1], rank[2], strict=True))


def steps_that_may_not_wait(backend, stage):
    device = device_of(backend)
    engine, ema = build_engine(stage, device)
    packs = [packs_of(device, step) for step in range(STEPS)]
    for step in range(STEPS):
        if step == 2 and device.type == "cuda":  # the first ones compile and allocate
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        take_step(engine, ema, packs[step], step)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    return all(bool(w.isfinite().all()) for w in engine.compute_weights().values())


@pytest.mark.parametrize("backend", devices(1))
@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_does_not_wait_for_the_device(backend, stage):
    assert run_processes(steps_that_may_not_wait, [0], 1, backend, (backend, stage), 240) == [True]


def test_gradients_are_reduced_in_several_messages_each_of_which_holds_the_largest_parameter():
    small, one_large, large = [1000] * 40, [10, 9000, 10], [50_000_000] * 100
    assert bucket_elements(small, 8) == 10_000 and bucket_elements(one_large, 8) == 9000
    assert bucket_elements(large, 8) == 50_000_000 and bucket_elements([1000] * 10**6, 8) == BUCKET_ELEMENTS
    assert bucket_elements([1000] * 10**6, 128) == 128_000_000
