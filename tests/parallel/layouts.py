"""One table of layouts, one global batch, one model: what every layout must train alike, and the single process itself.

The batch is several packs with segments of very different lengths, an image of 4 tokens next to a clip of 1,000. All
weights are random, so that nothing is zero that could hide an error.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from megasora.batch import VideoBatch
from megasora.config import Config, load
from megasora.data.pack import Record, make_batch
from megasora.diffusion.flow import FlowMatching, velocity_error
from megasora.optim.schedule import lr_at

PATCH_DIM = 6
STEPS = 3
DIALECTS = {
    "block": ["model.modulation=block", "model.qk_norm=per_head"],
    "shared": ["model.modulation=shared", "model.qk_norm=across_heads"],
}
BASE = [
    "model.width=32", "model.heads=4", "model.depth=4", "model.mlp_ratio=2.5", "codec.channels=6", "run.seed=5",
    "data.tokens_per_pack=1066", "optim.lr=0.01", "optim.warmup_steps=2", "optim.max_grad_norm=0.1",
    "run.steps=100", "run.device=cpu", "run.dtype=float32", "optim.eps=1e-5", "optim.weight_decay=0.1",
]  # fmt: skip
GRIDS = [  # of each pack: latent frames, rows, columns of tokens; some are part-full
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
    """Keyword `packs` is data.packs_per_step, `depth` model.depth, all others are of `parallel`."""
    data = processes // (axes.get("tensor", 1) * axes.get("context", 1) * axes.get("pipeline", 1))
    name = ",".join(f"{key}={value}" for key, value in {"data": data, **axes}.items())
    axes.setdefault("packs", 4 if data > 1 or "pipeline" in axes else 2)  # where ranks take or pass several
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


def configure(layout: Layout, dialect: str) -> Config:
    return load(None, [*BASE, *DIALECTS[dialect], *layout.settings])


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
    """A weight with nothing special about it, from its name alone."""
    draw = torch.Generator().manual_seed(sum(map(ord, name)) * 7919 + len(name))
    spread = 0.25 if len(shape) > 1 else 0.1
    return torch.randn(shape, generator=draw) * spread + (1.0 if "norm" in name and name.endswith("weight") else 0.0)


def objective_of(config: Config) -> FlowMatching:
    return FlowMatching(config.objective, config.run.seed)


def single_process(config: Config, dtype: torch.dtype, steps: int) -> dict:
    """Plain torch, whole packs, one after the other: loss, gradients and norm of each step, weights and Adam's mean of
    gradients after `steps` steps."""
    from megasora.build import build_model

    model = build_model(config, PATCH_DIM)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_weight(name, parameter.shape))
    model.to(dtype)
    whole_matrix = {
        n: p.ndim > 1 and not n.startswith("patch_") and "table" not in n for n, p in model.named_parameters()
    }
    decayed = [p for n, p in model.named_parameters() if whole_matrix[n]]
    others = [p for n, p in model.named_parameters() if not whole_matrix[n]]
    o, objective = config.optim, objective_of(config)
    adam = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay,
    )  # fmt: skip
    losses, norms, first = [], [], {}
    for step in range(steps):
        problems = [objective.add_noise(pack, step) for pack in global_batch(config)]
        tokens = sum(int(weight.sum()) for _, _, weight in problems)
        loss = torch.zeros((), dtype=torch.float64)
        for noised, target, weight in problems:
            error = velocity_error(model(noised), target.to(dtype), weight).squared_error_sum / tokens
            error.backward()
            loss += error.detach()
        for name, parameter in model.named_parameters() if step == 0 else ():
            first[name] = parameter.grad.clone()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), o.max_grad_norm)))
        losses.append(float(loss))
        for group in adam.param_groups:
            group["lr"] = lr_at(step, config.run.steps, o)
        adam.step()
        adam.zero_grad()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {"losses": losses, "norms": norms, "gradients": first, "weights": weights}


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """(the largest over all tensors of max |a - b| / max |b|, its name). Raises where names or shapes differ."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    worst = (0.0, "")
    for name, b in expected.items():
        a = found[name].to(torch.float64)
        assert a.shape == b.shape, (name, a.shape, b.shape)
        assert float(b.abs().max()) > 0, f"{name} is all zero and proves nothing"
        assert bool(a.isfinite().all()), f"{name} is not finite"  # a maximum would pass over a NaN
        worst = max(worst, (float((a - b.double()).abs().max() / b.double().abs().max()), name))
    return worst


def off(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected)


def module_errors(results: list[dict], exact: dict) -> dict[str, float]:
    """How far off are the ranks' `train_modules`, relative to the single process: {what: error}."""
    error, name = relative_error(whole(results), exact["gradients"])
    return {
        "loss": off(results[0]["loss"], exact["losses"][0]),
        "norm of the gradient": off(results[0]["norm"], exact["norms"][0]),
        f"gradient of {name}": error,
    }


def step_errors(found: dict, single: dict, config: Config) -> dict[str, float]:
    """The same of `train_steps`. Adam's mean after the first step is the clipped gradient, but for a factor."""
    clip, beta = config.optim.max_grad_norm / single["norms"][0], config.optim.betas[0]
    assert clip < 1, "clipping must be active"
    means = {name: (1 - beta) * clip * gradient for name, gradient in single["gradients"].items()}
    mean_error, mean_name = relative_error(found["means"], means)
    weight_error, weight_name = relative_error(found["weights"], single["weights"])
    numbers = {
        f"{what} of step {step}": off(a, b)
        for what, key in (("loss", "losses"), ("norm", "norms"))
        for step, (a, b) in enumerate(zip(found[key], single[key], strict=True))
    }
    return {
        **numbers,
        f"clipped gradient of {mean_name}": mean_error,
        f"{weight_name} after {len(single['losses'])} steps": weight_error,
    }


# ---------------------------------------------------------------------- what the ranks of a layout run


def train_modules(config: Config) -> dict | None:
    """One forward and backward in float64, without DeepSpeed: loss and whole gradients, on rank 0."""
    from megasora.parallel.mesh import build_mesh
    from megasora.parallel.share import share_pack
    from megasora.parallelize import build_pipeline

    mesh = build_mesh(config.parallel, "cpu")
    local = random_local_model(config, mesh)
    for stage in local.stages.values():
        stage.double()
    packs = global_batch(config)[mesh.data.rank :: mesh.data.size]
    problems = [objective_of(config).add_noise(share_pack(p, config, mesh), 0) for p in packs]
    noised, targets, weights = zip(*problems, strict=True)
    tokens = torch.tensor(sum(float(w.sum()) for w in weights), dtype=torch.float64)
    dist.all_reduce(tokens, group=mesh.data_context.group)
    loss_sum = torch.zeros((), dtype=torch.float64)

    def loss(prediction: Tensor, number: int) -> Tensor:
        error = velocity_error(prediction, targets[number].double(), weights[number]).squared_error_sum / tokens
        loss_sum.add_(error.detach())
        return error

    if mesh.pipeline.is_split:
        pipeline = build_pipeline(local.stages, config, mesh, torch.device("cpu"), torch.float64, lambda stage: None)
        pipeline.forward_backward(list(noised), loss)
    else:
        for number, pack in enumerate(noised):
            loss(local.stages[0](pack), number).backward()
    parameters = {name: p for stage in local.stages.values() for name, p in stage.named_parameters()}
    gradients = {}
    for name, parameter in parameters.items():
        gradients[name] = parameter.grad.clone()
        for axis in ("data_context", *local.placements[name].partial_axes):
            dist.all_reduce(gradients[name], group=getattr(mesh, axis).group)
    ranks = mesh.pipeline.rank, mesh.tensor.rank
    primary = [name for name in gradients if local.placements[name].is_primary_replica(*ranks)]
    squares = [gradients[name].square().sum() for name in primary]
    square = sum(squares, torch.zeros((), dtype=torch.float64))
    dist.all_reduce(square, group=mesh.model.group)
    dist.all_reduce(loss_sum)
    sent = local.attention.pop_bytes_sent() if local.attention is not None else 0
    here = [(name, local.placements[name], gradients[name]) for name in primary]
    return {
        "loss": float(loss_sum) / mesh.tensor.size, "norm": float(square.sqrt()), "sent": sent,
        "parts": here if mesh.data_context.rank == 0 else [],
    }  # fmt: skip


def train_steps(config: Config, steps: int = STEPS) -> dict | None:
    """Whole steps through DeepSpeed: losses, norms, Adam's means after the first, weights after the last."""
    from megasora import parallelize as seam
    from megasora.parallel.collectives import all_reduce_sum
    from megasora.parallel.replica_check import check_replicas
    from megasora.parallel.mesh import build_mesh
    from megasora.parallel.share import share_pack
    from megasora.parallel.world import World

    world = World(dist.get_rank(), dist.get_world_size(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    mesh = build_mesh(config.parallel, "cpu")
    seam.initial_weights = lambda config: random_weight
    engine, objective = seam.parallelize(config, world, mesh), objective_of(config)
    losses, norms, means = [], [], None
    for step in range(steps):
        packs = global_batch(config)[mesh.data.rank :: mesh.data.size]
        problems = [objective.add_noise(share_pack(p, config, mesh), step) for p in packs]
        noised, targets, weights = zip(*problems, strict=True)
        tokens = float(all_reduce_sum(torch.tensor(sum(float(w.sum()) for w in weights)), mesh.data_context))
        loss_sum = torch.zeros((), dtype=torch.float64)

        def loss(prediction, number, targets=targets, weights=weights, tokens=tokens, loss_sum=loss_sum):
            error = velocity_error(prediction, targets[number], weights[number]).squared_error_sum / tokens
            loss_sum.add_(error.detach())
            return error

        norms.append(engine.train_step(list(noised), loss, lr_at(step, config.run.steps, config.optim)))
        losses.append(float(world.all_reduce_sum(loss_sum)) / mesh.tensor.size)
        if step == 0:
            means = put_together(engine, world, "exp_avg")
        sliced = config.parallel.zero_stage == 3
        check_replicas(engine.compute_weights(), engine.placements, mesh, world, step, sliced)
    weights = put_together(engine, world, "weights")
    return {"losses": losses, "norms": norms, "means": means, "weights": weights} if world.is_main else None


def random_local_model(config: Config, mesh):
    from megasora import parallelize as seam

    seam.initial_weights = lambda config: random_weight
    return seam.build_local_model(config, torch.device("cpu"), mesh)


def put_together(engine, world, kind: str) -> dict[str, Tensor] | None:
    """What the ranks own of one kind, as full tensors on the main one."""
    here = [
        dataclasses.replace(f, values={kind: f.values[kind].clone()})
        for f in engine.fragments()
        if f.placement.is_primary_replica(engine.mesh.pipeline.rank, engine.mesh.tensor.rank)
    ]
    everyone = world.gather_objects(here)
    if everyone is None:
        return None
    parts, placements = {}, {}  # name: tensor rank: its part
    for f in chain(*everyone):
        shape = f.placement.local_shape(f.shape, f.tensor_size)
        part = parts.setdefault(f.name, {}).setdefault(f.tensor_rank, torch.zeros(shape))
        part.view(-1)[f.start : f.start + f.count] = f.values[kind]
        placements[f.name] = f.placement
    return {name: placements[name].full([p for _, p in sorted(parts[name].items())]) for name in sorted(parts)}


def train_both(configs: list[Config]) -> list[tuple[dict, dict | None]]:
    return [(train_modules(config), train_steps(config)) for config in configs]


def whole(results: list[dict]) -> dict[str, Tensor]:
    """Gradients of all ranks' parts put together."""
    parts: dict[str, list[Tensor]] = {}
    placements = {}
    for result in results:  # in the order of ranks: tensor innermost
        for name, placement, value in result["parts"]:
            parts.setdefault(name, []).append(value)
            placements[name] = placement
    return {name: placements[name].full(found) for name, found in parts.items()}
