"""optim.name=muon through DeepSpeed: every layout takes the steps of plain PyTorch in float64 on whole matrices; bf16
and resumes; layouts that divide matrices are refused."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.distributed as dist
from layouts import (
    PATCH_DIM,
    STEPS,
    configure,
    gather_full_tensors,
    global_batch,
    layout,
    objective_of,
    random_weight,
    relative_difference,
    relative_error,
    train_steps,
)
from test_codec_steps import BASE, codec_config, make_clips, train_all
from test_zero import build_engine, clone_values, engines_at_the_same_step, train_step

from megasora.build import build_model
from megasora.config import load
from megasora.diffusion.flow import velocity_error
from megasora.errors import MegaSoraError
from megasora.optim.schedule import lr_at
from megasora.parallel.layout import check_codec_layout, check_layout
from megasora.testing.spawn import run_ranks

CHUNKS = {"final_modulation.proj": 2, "modulation.proj": 6, "attention.qkv": 3, "cross.kv": 2, "blocks.0.qkv": 3}
ADAMW = ("patch_in", "patch_out", "timestep", "native", "text.byte", "text.place")
LAYOUTS = [
    layout(1, packs=4),
    layout(2),
    layout(2, zero_stage=2),
    layout(2, context=2, packs=4),
    layout(4),
    layout(4, context=2, pipeline=2),
    layout(4, pipeline=2, schedule="zbv"),
]
CODEC_LAYOUTS = {1: [""], 2: ["", "context=2"], 4: ["context=2 zero_stage=2"]}  # processes: settings of `parallel`
SMOOTH = ["reconstruction.l1=0", "reconstruction.mse=1", "reconstruction.gradient=0"]  # gradients then have no jumps
STAGES = [(1, "float32"), (2, "float32"), (1, "bfloat16"), (2, "bfloat16")]
MOMENTS = ("weights", "exp_avg", "exp_avg_sq")
SCALARS, WEIGHTS = 2e-5, 1e-4


def muon_config(layout, dtype="float32"):
    config = configure(layout, "block")
    config.optim.name, config.optim.muon_momentum, config.optim.warmup_steps = "muon", 0.9, 0
    config.run.dtype = dtype
    return config


def has_muon(name, parameter):
    return parameter.ndim > 1 and not name.startswith(ADAMW)


# ---------------------------------------------------------------------- run by the ranks


def train(configs, stages):
    """What a rank has of all runs with as many processes."""
    return {
        "steps": {name: train_steps(config) for name, config in configs.items()},
        "resumed": {stage: resume_in_another_engine(*stage) for stage in stages},
        "full": full_tensors_of_two_steps() if stages else None,
    }


def resume_in_another_engine(zero_stage, dtype):
    """Names of the fragments; their values after one step; after the second one of this engine, and of another that has
    loaded them."""
    config = muon_config(layout(dist.get_world_size(), zero_stage=zero_stage, depth=1, packs=2), dtype)
    first, second, saved = engines_at_the_same_step(config)
    for engine in (first, second):
        train_step(engine, config, 1)
    return [f.name for f in first.fragments()], saved, *(clone_values(e.fragments()) for e in (first, second))


def full_tensors_of_two_steps():
    """The full tensors after one step, by kind; the full weights after the second. On rank 0."""
    config = muon_config(layout(dist.get_world_size(), depth=1, packs=2))
    engine = build_engine(config)
    train_step(engine, config, 0)
    before = {kind: gather_full_tensors(engine, engine.world, kind) for kind in MOMENTS}
    train_step(engine, config, 1)
    return before, gather_full_tensors(engine, engine.world, "weights")


def resume_from(tensors):
    """The full weights after the second step, on one process."""
    config = muon_config(layout(1, depth=1, packs=2))
    engine = build_engine(config)
    for fragment in engine.fragments():
        for kind, values in fragment.values.items():
            values.copy_(tensors[kind][fragment.name].flatten())
    engine.sync_after_load(1)
    train_step(engine, config, 1)
    return gather_full_tensors(engine, engine.world, "weights")


@cache
def results(processes):
    """What each of these processes has."""
    configs = {case.name: muon_config(case) for case in LAYOUTS if case.processes == processes}
    return run_ranks(train, processes, configs, STAGES if processes == 2 else [])


@pytest.fixture(scope="module")
def codec_results(tmp_path_factory):
    """A function from a number of processes to the steps of its layouts."""
    folder = make_clips(tmp_path_factory)

    @cache
    def of(processes):
        configs = {
            settings: codec_config(folder, settings, *SMOOTH, "optim.name=muon")
            for settings in CODEC_LAYOUTS[processes]
        }
        return run_ranks(train_all, processes, configs)[0]

    return of


# ---------------------------------------------------------------------- the same steps in every layout


def muon_step(update, chunks):
    """One orthogonal step per chunk, from singular value decompositions."""
    steps = []
    for matrix in update.flatten(1).chunk(chunks):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        steps.append(u @ torch.diag(s) @ vh * 0.2 * max(matrix.shape) ** 0.5)
    return torch.cat(steps).view_as(update)


@cache
def plain_steps():
    """The reference: losses and norms of the steps, weights after the last."""
    config = muon_config(layout(1, packs=4))
    model, o, objective = build_model(config, PATCH_DIM), config.optim, objective_of(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_weight(name, parameter.shape))
    model.double()
    parameters = dict(model.named_parameters())
    decay = {n: o.weight_decay * (p.ndim > 1 and not n.startswith("patch_")) for n, p in parameters.items()}
    momenta = {n: torch.zeros_like(p) for n, p in parameters.items() if has_muon(n, p)}
    groups = [{"params": [p], "weight_decay": decay[n]} for n, p in parameters.items() if not has_muon(n, p)]
    adamw = torch.optim.AdamW(groups, lr=o.lr, betas=tuple(o.betas), eps=o.eps)
    losses, norms, m = [], [], o.muon_momentum
    for step in range(STEPS):
        packs = [objective.add_noise(pack, step) for pack in global_batch(config)]
        tokens = sum(int(weight.sum()) for _, _, weight in packs)
        errors = [velocity_error(model(noised), target.double(), weight) for noised, target, weight in packs]
        loss = sum(error.squared_error_sum for error in errors) / tokens
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), o.max_grad_norm)))
        losses.append(float(loss.detach()))
        lr = lr_at(step, config.run.steps, o)
        for name, momentum in momenta.items():
            parameter = parameters[name]
            momentum.mul_(m).add_(parameter.grad, alpha=1 - m)
            chunks = next((n for layer, n in CHUNKS.items() if name.endswith(f"{layer}.weight")), 1)
            direction = muon_step(m * momentum + (1 - m) * parameter.grad, chunks)
            parameter.data -= lr * (decay[name] * parameter.data + direction)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        model.zero_grad()
    return losses, norms, {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_a_layout_takes_the_steps_of_plain_pytorch(case):
    losses, norms, weights = plain_steps()
    trained = results(case.processes)[0]["steps"][case.name]
    for step in range(STEPS):
        assert relative_difference(trained["losses"][step], losses[step]) <= SCALARS, step
        assert relative_difference(trained["norms"][step], norms[step]) <= SCALARS, step
    error, name = relative_error(trained["weights"], weights)
    assert error <= WEIGHTS, f"{name} has error {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("processes", CODEC_LAYOUTS)
def test_a_layout_trains_the_same_codec(processes, codec_results):
    expected = codec_results(1)[""]
    assert expected[-1]["loss"] < expected[0]["loss"]
    for settings, trained in codec_results(processes).items():
        for step, (a, b) in enumerate(zip(trained, expected, strict=True)):
            assert a == pytest.approx(b, rel=SCALARS), f"{settings}, step {step}"


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_an_engine_that_has_loaded_fragments_resumes_bit_for_bit(stage):
    for rank in results(2):
        _, saved, first, second = rank["resumed"][stage]
        for kind in MOMENTS:
            a, b, before = (torch.cat([values[kind] for values in all_]) for all_ in (first, second, saved))
            assert torch.equal(a, b) and not torch.equal(a, before)


@pytest.mark.slow
def test_matrices_have_a_momentum_and_no_second_moment():
    before, _ = results(2)[0]["full"]
    matrices = [name for name, weight in before["weights"].items() if has_muon(name, weight)]
    assert len(matrices) > 10
    for name in before["weights"]:
        assert before["exp_avg"][name].any()
        assert bool(before["exp_avg_sq"][name].any()) == (name not in matrices), name


@pytest.mark.slow
def test_another_layout_resumes_with_the_momentum_of_this_one():
    before, after = results(2)[0]["full"]
    error, name = relative_error(run_ranks(resume_from, 1, before)[0], after)
    assert error <= WEIGHTS, f"{name} has error {error:.1e}"


# ---------------------------------------------------------------------- layouts that divide matrices


def test_a_layout_that_divides_matrices_is_refused():
    tensor, zero3 = layout(2, tensor=2), layout(2, zero_stage=3)
    for case, words in ((tensor, "parallel.tensor=2 divides each over 2 ranks; use"), (zero3, "parallel.zero_stage=3")):
        check_layout(configure(case, "block"), 2)
        with pytest.raises(MegaSoraError, match=f"optim.name=muon needs whole matrices, and {words}"):
            check_layout(muon_config(case), 2)
    codec = load(None, [*BASE, "optim.name=muon", "parallel.zero_stage=3"])
    with pytest.raises(MegaSoraError, match="optim.name=muon needs whole matrices, and parallel.zero_stage=3"):
        check_codec_layout(codec, 2)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(MegaSoraError, match="optim.name=adam"):
        load(None, [*BASE, "optim.name=adam"])
