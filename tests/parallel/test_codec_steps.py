"""Steps of CodecTask through DeepSpeed in fp32: one process and every layout have the same losses and norms."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from megasora.config import load
from megasora.data.clip_loader import ClipBatch, ClipStack, padded_size
from megasora.optim.update import Update
from megasora.parallel.mesh import build_mesh
from megasora.parallel.world import World
from megasora.tasks.codec import CodecTask
from megasora.testing.spawn import run_ranks

STEPS, RELATIVE = 3, 1e-5
BASE = [
    "codec.name=vae", "codec.factors=[4,4,4]", "codec.channels=4", "vae.width=8", "vae.multipliers=[1,2]",
    "vae.patch=2", "vae.blocks=1", "run.device=cpu", "run.dtype=float32", "data.packs_per_step=2", "run.seed=3",
    "optim.lr=0.003", "optim.eps=1e-5", "optim.warmup_steps=0", "optim.max_grad_norm=0.5", "vae.codebook_size=32",
    "reconstruction.kl=0.001", "run.debug_every=1",
]  # fmt: skip
PACKS = [  # clips, frames, rows and columns of each stack, not all of whole latents
    [(1, 13, 10, 8), (2, 1, 8, 8), (1, 6, 7, 9)],
    [(1, 1, 12, 9), (1, 9, 8, 12)],
]
LAYOUTS = {  # processes: settings of `parallel`
    1: [""],
    2: ["context=2", "context=2 rows=2", "context=2 zero_stage=2"],
    4: ["context=4 rows=2", "context=2"],
}
ADVERSARIAL = {"weight": 0.5, "start_step": 2, "width": 4, "layers": 2}
KINDS = {
    "kl": [],
    "vq": ["vae.kind=vq"],
    "adversarial": [f"reconstruction.adversarial.{key}={value}" for key, value in ADVERSARIAL.items()],
}
RUNS = [(processes, layout, kind) for processes, layouts in LAYOUTS.items() for layout in layouts for kind in KINDS]


def stack_of(size, step, number):
    generator = torch.Generator().manual_seed(100 * step + number)
    frames = torch.zeros(size[0], *padded_size(size[1:], (4, 4, 4)), 3, dtype=torch.uint8)
    coarse = torch.rand(size[0], 3, *size[1:], generator=generator) * 0.5 + torch.rand(
        size[0], 3, 1, 1, 1, generator=generator
    )
    frames[:, : size[1], : size[2], : size[3]] = coarse.movedim(1, -1).mul(170).to(torch.uint8)
    return ClipStack([10 * number + i for i in range(size[0])], frames, size[1:])


def losses_of(config):
    """(loss, penalty, psnr, norm of the gradient) of each step."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, local_rank=rank, local_size=size, device=torch.device("cpu"))
    task = CodecTask(config, world, build_mesh(config.parallel, "cpu"))
    data, results = task.mesh.data, []
    for step in range(STEPS):
        numbered = [[stack_of(s, step, 10 * p + i) for i, s in enumerate(pack)] for p, pack in enumerate(PACKS)]
        batch = ClipBatch(numbered[data.rank :: data.size], 5 * (step + 1))
        output = task.forward_backward(batch, step, lambda phase: None)
        sums = {name: world.all_reduce_sum(value) for name, value in output.sums.items()}
        loss = float(task.loss(sums, output.loss_count))
        metrics = task.step_metrics(batch, {name: float(x) for name, x in sums.items()}, loss, step)
        task.optimizer_step(Update(config.optim.lr, step))
        results.append({"loss": loss, "norm": float(output.grad_norm), **metrics.columns})
    return results


def train_all(configs):
    return {name: losses_of(config) for name, config in configs.items()}


def make_clips(tmp_path_factory):
    """A folder with one clip: a task lists clips, but the steps here have their own."""
    folder = tmp_path_factory.mktemp("clips")
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "a.txt").write_text("a")
    return folder


def codec_config(folder, layout, *settings):
    """`layout`: settings of `parallel`."""
    parallel = [f"parallel.{value}" for value in layout.split()]
    return load(None, [*BASE, f"data.clips={folder}", f"run.dir={folder.parent / 'run'}", *settings, *parallel])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A function from a number of processes to the results of its layouts."""
    folder = make_clips(tmp_path_factory)

    @cache
    def of(processes):
        configs = {
            (layout, kind): codec_config(folder, layout, *KINDS[kind])
            for layout in LAYOUTS[processes]
            for kind in KINDS
        }
        try:
            return run_ranks(train_all, processes, configs)[0]
        except (RuntimeError, TimeoutError) as error:
            return error

    return of


@pytest.mark.slow
@pytest.mark.parametrize("processes, layout, kind", RUNS, ids=str)
def test_a_layout_trains_the_same_codec(results, processes, layout, kind):
    if isinstance(results(processes), Exception):
        raise results(processes)
    trained, expected = results(processes)[layout, kind], results(1)["", kind]
    assert expected[-1]["loss"] < expected[0]["loss"]
    for step, (a, b) in enumerate(zip(trained, expected, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            # AdamW's first updates are about the sign of the gradient: they amplify rounding where it is nearly zero
            relative = 1e-4 if step and name == "norm" else RELATIVE
            assert a[name] == pytest.approx(b[name], rel=relative), f"{name} of step {step}"
