"""The table of layouts, one global batch and one model that every layout must train identically, and the single-process
reference.

The batch has several packs with segments of very different lengths, an image of 4 tokens next to a clip of 1,000. All
weights are random, so that no zero can hide an error.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from megasora import parallelize
from megasora.batch import VideoBatch
from megasora.build import build_model
from megasora.config import Config, load
from megasora.data.loader import StepBatch
from megasora.data.pack import Record, make_batch
from megasora.data.packing_plan import Cursor
from megasora.device_transfer import DeviceTransfer
from megasora.diffusion.flow import FlowMatching, velocity_error
from megasora.kernels.linear import Float8Products, Linear
from megasora.optim.schedule import lr_at
from megasora.optim.update import Update
from megasora.parallel.mesh import Mesh, build_mesh
from megasora.parallel.replica_check import check_replicas
from megasora.parallel.share import share_pack
from megasora.parallel.world import World
from megasora.parallel.zero import ZeroEngine
from megasora.parallelize import LocalModel
from megasora.placement import WHOLE, Placement
from megasora.tasks.dit import DiTTask

PATCH_DIM = 6
STEPS = 3
MODULATIONS = {  # value of model.modulation: settings of this variant of the block
    "block": ["model.modulation=block", "model.qk_norm=per_head"],
    "shared": ["model.modulation=shared", "model.qk_norm=across_heads"],
}
BASE = [
    "model.width=32", "model.heads=4", "model.depth=4", "model.mlp_ratio=2.5", "codec.channels=6", "run.seed=5",
    "data.tokens_per_pack=1066", "optim.lr=0.01", "optim.warmup_steps=2", "optim.max_grad_norm=0.1",
    "run.steps=100", "run.device=cpu", "run.dtype=float32", "optim.eps=1e-5", "optim.weight_decay=0.1",
]  # fmt: skip
GRIDS = [  # of the clips of each pack: latent frames, rows, columns of tokens; some packs have padding
    [(10, 10, 10), (1, 2, 2), (3, 4, 5)],
    [(1, 2, 2), (5, 9, 9), (4, 4, 8), (2, 16, 16)],
    [(1, 8, 8), (1, 1, 1), (7, 5, 6), (1, 2, 2), (2, 3, 4)],
    [(1, 1, 4), (9, 10, 11)],
    [(2, 4, 4)] * 9,
    [(1, 2, 2)],
    [(20, 5, 10), (1, 8, 8)],
    [(1, 16, 16), (1, 16, 16), (1, 16, 16), (1, 16, 16)],
]


@dataclass(frozen=True)
class Layout:
    name: str
    processes: int
    settings: tuple[str, ...]


def layout(processes: int, **axes: int | str) -> Layout:
    """Keywords: `packs` (data.packs_per_step), `depth`, `recompute` (of `model`), and keys of `parallel`."""
    data = processes // (axes.get("tensor", 1) * axes.get("context", 1) * axes.get("pipeline", 1))
    name = ",".join(f"{key}={value}" for key, value in {"data": data, **axes}.items())
    axes.setdefault("packs", 4 if data > 1 or "pipeline" in axes else 2)
    section = {"packs": "data.packs_per_step", "depth": "model.depth", "recompute": "model.recompute"}
    return Layout(name, processes, tuple(f"{section.get(k, f'parallel.{k}')}={v}" for k, v in axes.items()))


LAYOUTS = [
    layout(1),
    layout(2, tensor=2),
    layout(4, tensor=4),
    layout(2, context=2),
    layout(3, context=3),
    layout(4, context=4),
    layout(2, context=2, ulysses=2),
    layout(4, context=4, ulysses=2),
    layout(2, pipeline=2),
    layout(4, pipeline=4),
    layout(2, pipeline=2, schedule="interleaved", stages_per_rank=2),
    layout(4, pipeline=4, schedule="interleaved", stages_per_rank=2, depth=8),
    layout(2, pipeline=2, schedule="zbv"),
    layout(4, pipeline=4, schedule="zbv", depth=8, packs=8),
    layout(2, zero_stage=1),
    layout(2, zero_stage=2),
    layout(2, zero_stage=3),
    layout(4, tensor=2, context=2),
    layout(4, tensor=2, pipeline=2),
    layout(4, context=2, pipeline=2),
    layout(8, tensor=2, context=2),
    layout(8, tensor=2, context=2, zero_stage=3),
    layout(8, tensor=2, context=2, pipeline=2),
    layout(8, tensor=2, context=2, pipeline=2, schedule="zbv", recompute="keep_attention"),
    layout(4, tensor=2, context=2, recompute="full"),
    layout(4, tensor=2, context=2, recompute="keep_attention"),
    layout(4, context=4, ulysses=2, recompute="keep_attention"),
    layout(2, pipeline=2, schedule="interleaved", stages_per_rank=2, recompute="keep_attention"),
    layout(8, tensor=2, pipeline=4),
]


def configure(layout: Layout, modulation: str) -> Config:
    return load(None, [*BASE, *MODULATIONS[modulation], *layout.settings])


def global_batch(config: Config) -> list[VideoBatch]:
    """The packs of one step, clean, in their order."""
    packs, sample_id = [], 0
    for grids in GRIDS[: config.data.packs_per_step]:
        records = []
        for t, h, w in grids:
            draw = torch.Generator().manual_seed(sample_id)
            patches = torch.randn(t * h * w, PATCH_DIM, generator=draw)
            words = torch.randint(0, 257, (1 + sample_id % 5, 16), generator=draw)
            native = (8.0 * h, 8.0 * w, 4.0 * t - 3, 8.0 + sample_id)
            records.append(Record(sample_id, patches, (t, h, w), words, native, "x" if sample_id % 7 else ""))
            sample_id += 1
        packs.append(make_batch(records, config.data.tokens_per_pack))
    return packs


def random_weight(name: str, shape: torch.Size) -> Tensor:
    """A random weight that depends on its name and shape only."""
    draw = torch.Generator().manual_seed(sum(map(ord, name)) * 7919 + len(name))
    std = 0.25 if len(shape) > 1 else 0.1
    return torch.randn(shape, generator=draw) * std + (1.0 if "norm" in name and name.endswith("weight") else 0.0)


class RandomWeights:
    """A WeightSource of `random_weight`."""

    @torch.no_grad()
    def fill(self, out: Tensor, name: str, placement: Placement = WHOLE, rank: int = 0, size: int = 1) -> None:
        full = random_weight(name, placement.full_shape(out.shape, size))
        out.copy_(placement.local(full, rank, size))


def objective_of(config: Config) -> FlowMatching:
    return FlowMatching(config.objective, config.run.seed)


def single_process(config: Config, dtype: torch.dtype, steps: int) -> dict:
    """The reference, in plain PyTorch with whole packs: loss and gradient norm of each step, gradients of the first,
    weights after the last."""
    model = build_model(config, PATCH_DIM)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_weight(name, parameter.shape))
    model.to(dtype)
    for module in model.modules() if config.model.fp8_recipe != "none" else ():
        if isinstance(module, Linear):
            module.products = Float8Products(config.model.fp8_recipe)
    decays = {n: p.ndim > 1 and not n.startswith("patch_") and "table" not in n for n, p in model.named_parameters()}
    with_decay = [p for n, p in model.named_parameters() if decays[n]]
    without_decay = [p for n, p in model.named_parameters() if not decays[n]]
    o, objective = config.optim, objective_of(config)
    adam = torch.optim.AdamW(
        [{"params": with_decay}, {"params": without_decay, "weight_decay": 0.0}],
        betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay,
    )  # fmt: skip
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        noised_packs = [objective.add_noise(pack, step) for pack in global_batch(config)]
        tokens = sum(int(weight.sum()) for _, _, weight in noised_packs)
        loss = torch.zeros((), dtype=torch.float64)
        for noised, target, weight in noised_packs:
            error = velocity_error(model(noised), target.to(dtype), weight).squared_error_sum / tokens
            error.backward()
            loss += error.detach()
        for name, parameter in model.named_parameters() if step == 0 else ():
            gradients[name] = parameter.grad.clone()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), o.max_grad_norm)))
        losses.append(float(loss))
        for group in adam.param_groups:
            group["lr"] = lr_at(step, config.run.steps, o)
        adam.step()
        adam.zero_grad()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights}


def relative_error(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """(largest max |a - b| / max |b| of all tensors, name of that tensor). AssertionError if names or shapes differ."""
    assert tensors.keys() == expected.keys(), sorted(tensors.keys() ^ expected.keys())
    worst = (0.0, "")
    for name, b in expected.items():
        a = tensors[name].to(torch.float64)
        assert a.shape == b.shape, (name, a.shape, b.shape)
        assert float(b.abs().max()) > 0, f"{name} is all zero: the comparison would be empty"
        assert bool(a.isfinite().all()), f"{name} is not finite"  # max() ignores NaN
        worst = max(worst, (float((a - b.double()).abs().max() / b.double().abs().max()), name))
    return worst


def relative_difference(value: float, expected: float) -> float:
    return abs(value - expected) / abs(expected)


def module_errors(results: list[dict], exact: dict) -> dict[str, float]:
    """{quantity: error of the ranks' `train_modules`, relative to the single process}."""
    error, name = relative_error(full_gradients(results), exact["gradients"])
    return {
        "loss": relative_difference(results[0]["loss"], exact["losses"][0]),
        "norm of the gradient": relative_difference(results[0]["norm"], exact["norms"][0]),
        f"gradient of {name}": error,
    }


def step_errors(trained: dict, single: dict, config: Config) -> dict[str, float]:
    """The same for `train_steps`. After the first step Adam's exp_avg is the clipped gradient times 1 - beta."""
    clip, beta = config.optim.max_grad_norm / single["norms"][0], config.optim.betas[0]
    assert clip < 1, "clipping must be active"
    exp_avg = {name: (1 - beta) * clip * gradient for name, gradient in single["gradients"].items()}
    gradient_error, gradient_name = relative_error(trained["exp_avg"], exp_avg)
    weight_error, weight_name = relative_error(trained["weights"], single["weights"])
    scalars = {
        f"{what} of step {step}": relative_difference(a, b)
        for what, key in (("loss", "losses"), ("norm", "norms"))
        for step, (a, b) in enumerate(zip(trained[key], single[key], strict=True))
    }
    return {
        **scalars,
        f"clipped gradient of {gradient_name}": gradient_error,
        f"{weight_name} after {len(single['losses'])} steps": weight_error,
    }


# ---------------------------------------------------------------------- run by the ranks of a layout


def train_modules(config: Config) -> dict | None:
    """One forward and backward pass in float64, without DeepSpeed: loss, norm and this rank's gradients."""
    mesh = build_mesh(config.parallel, "cpu")
    local = random_local_model(config, mesh)
    for stage in local.stages.values():
        stage.double()
    packs = global_batch(config)[mesh.data.rank :: mesh.data.size]
    noised_shares = [objective_of(config).add_noise(share_pack(p, config, mesh), 0) for p in packs]
    noised, targets, weights = zip(*noised_shares, strict=True)
    tokens = torch.tensor(sum(float(w.sum()) for w in weights), dtype=torch.float64)
    dist.all_reduce(tokens, group=mesh.data_context.group)
    loss_sum = torch.zeros((), dtype=torch.float64)

    def loss(prediction: Tensor, index: int) -> Tensor:
        error = velocity_error(prediction, targets[index].double(), weights[index]).squared_error_sum / tokens
        loss_sum.add_(error.detach())
        return error

    if mesh.pipeline.is_split:
        pipeline = parallelize.build_pipeline(
            local.stages, config, mesh, torch.device("cpu"), torch.float64, lambda stage: None
        )
        pipeline.forward_backward(list(noised), loss)
    else:
        for index, pack in enumerate(noised):
            loss(local.stages[0](pack), index).backward()
    parameters = {name: p for stage in local.stages.values() for name, p in stage.named_parameters()}
    gradients = {}
    for name, parameter in parameters.items():
        gradients[name] = parameter.grad.clone()
        for axis in ("data_context", *local.placements[name].partial_axes):
            dist.all_reduce(gradients[name], group=mesh.axis(axis).group)
    ranks = mesh.pipeline.rank, mesh.tensor.rank
    primary = [name for name in gradients if local.placements[name].is_primary_replica(*ranks)]
    squares = [gradients[name].square().sum() for name in primary]
    square = sum(squares, torch.zeros((), dtype=torch.float64))
    dist.all_reduce(square, group=mesh.model.group)
    dist.all_reduce(loss_sum)
    sent = local.attention.pop_bytes_sent() if local.attention is not None else 0
    local_gradients = [(name, local.placements[name], gradients[name]) for name in primary]
    return {
        "loss": float(loss_sum) / mesh.tensor.size, "norm": float(square.sqrt()), "sent": sent,
        "gradients": local_gradients if mesh.data_context.rank == 0 else [],
    }  # fmt: skip


def train_steps(config: Config, steps: int = STEPS) -> dict | None:
    """Steps of `DiTTask` through DeepSpeed: losses, norms, Adam's exp_avg after the first step, weights after the last;
    on rank 0. Checks all replicas after each step."""
    task = build_task(config)
    engine, world, mesh = task.engine, task.world, task.mesh
    losses, norms, exp_avg = [], [], None
    for step in range(steps):
        lr = lr_at(step, config.run.steps, config.optim)
        output = task.forward_backward(build_step_batch(task, step), step, lambda phase: None)
        task.optimizer_step(Update(lr, step))
        norms.append(float(output.grad_norm))
        sums = {"squared_error": world.all_reduce_sum(output.sums["squared_error"])}
        losses.append(float(task.loss(sums, output.loss_count)))
        if step == 0:
            exp_avg = gather_full_tensors(engine, world, "exp_avg")
        is_partitioned = config.parallel.zero_stage == 3
        check_replicas(engine.compute_weights(), engine.placements, mesh, world, step, is_partitioned)
    weights = gather_full_tensors(engine, world, "weights")
    return {"losses": losses, "norms": norms, "exp_avg": exp_avg, "weights": weights} if world.is_main else None


class TaskWithoutData(DiTTask):
    """A DiTTask with random weights, whose packs come from `build_step_batch`."""

    def __init__(self, config: Config, world: World, mesh: Mesh):
        self.config, self.world, self.mesh = config, world, mesh
        self.objective, self.reports_packs = objective_of(config), False
        self.transfer = DeviceTransfer(world.device)
        parallelize.initial_weights = lambda config: RandomWeights()
        self.engine = parallelize.parallelize(config, world, mesh)


def build_task(config: Config) -> TaskWithoutData:
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(
        rank, size, local_rank=0, local_size=1, device=torch.device("cpu")
    )  # each a node: objects are not sent
    return TaskWithoutData(config, world, build_mesh(config.parallel, "cpu"))


def build_step_batch(task: DiTTask, step: int) -> StepBatch:
    """This rank's packs of the global batch."""
    packs = global_batch(task.config)[task.mesh.data.rank :: task.mesh.data.size]
    shares = [task.share(pack, step) for pack in packs]
    return StepBatch(step, packs, shares, real_tokens=1, dropped_fraction=0.0, next_cursor=Cursor(), damaged=[])


def random_local_model(config: Config, mesh: Mesh) -> LocalModel:
    parallelize.initial_weights = lambda config: RandomWeights()
    return parallelize.build_local_model(config, torch.device("cpu"), mesh)


def gather_full_tensors(engine: ZeroEngine, world: World, kind: str) -> dict[str, Tensor] | None:
    """The full tensors of one kind of the ranks' fragments, on rank 0."""
    local = [
        dataclasses.replace(f, values={kind: f.values[kind].clone()})
        for f in engine.fragments()
        if f.placement.is_primary_replica(engine.mesh.pipeline.rank, engine.mesh.tensor.rank)
    ]
    fragments_by_rank = world.gather_objects(local)
    if fragments_by_rank is None:
        return None
    shards, placements = {}, {}  # name: tensor rank: shard
    for f in chain(*fragments_by_rank):
        shape = f.placement.local_shape(f.shape, f.tensor_size)
        shard = shards.setdefault(f.name, {}).setdefault(f.tensor_rank, torch.zeros(shape))
        shard.view(-1)[f.start : f.start + f.count] = f.values[kind]
        placements[f.name] = f.placement
    return {
        name: placements[name].full([shard for _, shard in sorted(shards[name].items())]) for name in sorted(shards)
    }


def train_both(configs: list[Config]) -> list[tuple[dict, dict | None]]:
    return [(train_modules(config), train_steps(config)) for config in configs]


def full_gradients(results: list[dict]) -> dict[str, Tensor]:
    """The full gradients, from the results of `train_modules` on all ranks."""
    shards: dict[str, list[Tensor]] = {}
    placements = {}
    for result in results:  # in the order of ranks: tensor innermost
        for name, placement, gradient in result["gradients"]:
            shards.setdefault(name, []).append(gradient)
            placements[name] = placement
    return {name: placements[name].full(shards[name]) for name in shards}
