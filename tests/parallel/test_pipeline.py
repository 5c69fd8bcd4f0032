"""A pipeline of toy stages against the same stages one after the other in one process: losses, gradients, predictions.

Run as a script with a folder and a number of ranks, it is those ranks: each goes through the cases and leaves what it
measured. They are started once for each number of ranks, and compared by the tests.
"""

import gc
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble
from torch.utils.checkpoint import checkpoint

from megasora.errors import MegaSoraError
from megasora.parallel.mesh import Axis
from megasora.parallel.pipeline import (
    Pipeline,
    WeightGradients,
    apply_later,
    check_microbatches,
    num_stages,
    rank_of_stage,
    stage_numbers,
)

TOKENS, WIDTH, PATCH, HIDDEN = 11, 6, 4, 8  # no two shapes alike


@dataclass(frozen=True)
class Case:
    schedule: str
    pipeline: int
    packs: int
    stages_per_rank: int = 1
    recompute: bool = False
    tensor: int = 1  # ranks that share the matrices of the MLPs, with collectives in both passes
    share: bool = False  # the stages of a rank share their conditioning's weights

    def __str__(self) -> str:
        parts = (
            self.schedule,
            f"{self.pipeline}x{self.stages_per_rank}",
            f"{self.packs}packs",
            "recompute" * self.recompute,
            "tensor" * (self.tensor > 1),
            "shared" * self.share,
        )
        return "-".join(part for part in parts if part)


CASES = {
    2: [
        Case("1f1b", 2, 2),
        Case("1f1b", 2, 5, recompute=True),
        Case("interleaved", 2, 2, 2),
        Case("interleaved", 2, 6, 2, recompute=True, share=True),
        Case("interleaved", 2, 4, 3),
        Case("zbv", 2, 1),
        Case("zbv", 2, 3),
        Case("zbv", 2, 6, recompute=True, share=True),
    ],
    4: [
        Case("1f1b", 4, 4),
        Case("1f1b", 4, 7, recompute=True),
        Case("interleaved", 4, 3, 2),
        Case("interleaved", 4, 5, 2),
        Case("zbv", 4, 3),
        Case("zbv", 4, 9, recompute=True),
        Case("1f1b", 2, 3, tensor=2),
        Case("interleaved", 2, 4, 2, recompute=True, tensor=2),
        Case("zbv", 2, 4, tensor=2),
        Case("zbv", 2, 5, recompute=True, tensor=2),
    ],
}


# --- the toy: everything about a DiT that could go wrong, and nothing else


@dataclass(frozen=True)
class ToyPack:
    patches_LP: torch.Tensor
    level: torch.Tensor
    target_LP: torch.Tensor
    clips: tuple[int, ...]  # how many tokens each has: no tensor, no static shape


def make_pack(seed: int, dtype: torch.dtype) -> ToyPack:
    draw = torch.Generator().manual_seed(seed)
    patches, target = (torch.randn(TOKENS, PATCH, generator=draw, dtype=torch.float64).to(dtype) for _ in range(2))
    cut = 1 + seed % (TOKENS - 1)
    return ToyPack(patches, torch.rand(1, generator=draw).to(dtype), target, (cut, TOKENS - cut))


class SplitMLP(torch.autograd.Function):
    """(x W1^T) W2^T: each rank of `group` has a part of the hidden dim. Computes only the gradients it is asked for."""

    @staticmethod
    def forward(ctx, x, up, down, group):
        inner = x @ up.t()
        ctx.save_for_backward(x, up, down, inner)
        ctx.group = group
        return sum_over(inner @ down.t(), group)

    @staticmethod
    def backward(ctx, grad):
        x, up, down, inner = ctx.saved_tensors
        grad_inner = grad @ down
        grad_x = sum_over(grad_inner @ up, ctx.group) if ctx.needs_input_grad[0] else None
        grad_up = grad_inner.t() @ x if ctx.needs_input_grad[1] else None
        grad_down = grad.t() @ inner if ctx.needs_input_grad[2] else None
        return grad_x, grad_up, grad_down, None


def sum_over(x, group):
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


class ToyBlock(nn.Module):
    def __init__(self, group, part):
        super().__init__()
        self.group, self.part = group, part
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Parameter(torch.empty(HIDDEN, WIDTH))
        self.down = nn.Parameter(torch.empty(WIDTH, HIDDEN))

    def forward(self, x, cond, clips):
        shift, scale, gate = self.modulation(F.silu(cond)).chunk(3, -1)
        y = self.norm(x) * (1 + scale) + shift
        y = torch.cat([part + self.mix(part).mean(0) for part in y.split(clips)])  # tokens of a clip see each other
        up, down = self.up.chunk(self.part[1])[self.part[0]], self.down.chunk(self.part[1], 1)[self.part[0]]
        return x + gate * SplitMLP.apply(y, up, down, self.group).tanh()


class ToyStage(nn.Module):
    """As a stage of the model: conditioning of its own, replicated; one block; first and last have an end more."""

    def __init__(self, number, total, recompute=False, group=None, part=(0, 1)):
        super().__init__()
        self.recompute = recompute
        self.frozen = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(WIDTH))
        self.block = ToyBlock(group, part)
        self.patch_in = nn.Linear(PATCH, WIDTH) if number == 0 else None
        self.patch_out = nn.Linear(WIDTH, PATCH) if number == total - 1 else None
        self.cond = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        for name, parameter in self.named_parameters():
            seed = 100 + len(name) if name.startswith("cond") else 1000 * (number + 1) + len(name)
            draw = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) / 2)

    def forward(self, pack, hidden):
        x = hidden if self.patch_in is None else self.patch_in(pack.patches_LP)
        cond = self.cond(pack.level) * self.frozen
        if self.recompute:
            x = checkpoint(self.block, x, cond, pack.clips, use_reentrant=False)
        else:
            x = self.block(x, cond, pack.clips)
        # A transposed result: messages must be contiguous, the pipeline has to see to it.
        return x.t().contiguous().t() if self.patch_out is None else self.patch_out(x)


def toy_loss(packs):
    # sum() hands an expanded gradient back
    return lambda prediction, number: ((prediction - packs[number].target_LP) ** 2 * (1 + number)).mean(1).sum()


class OneProcess:
    """The stages of a case after each other; one conditioning for all of them, as in a model that is not cut."""

    def __init__(self, total: int, dtype: torch.dtype):
        self.stages = [ToyStage(n, total).to(dtype) for n in range(total)]
        for stage in self.stages[1:]:
            stage.cond = self.stages[0].cond

    def predict(self, pack):
        x = None
        for stage in self.stages:
            x = stage(pack, x)
        return x

    def train(self, packs, loss, fold=lambda stage: None):
        losses = []
        for number, pack in enumerate(packs):
            losses.append(loss(self.predict(pack), number))
            losses[-1].backward()
            for stage in self.stages:
                fold(stage)
        return [value.item() for value in losses]


# --- the ranks


def axes_of(world: int, pipeline: int, rank: int, groups: dict) -> tuple[Axis, Axis]:
    """The pipeline axis, and the tensor axis inside it, as the mesh would make them."""
    tensor = world // pipeline
    if pipeline not in groups:
        columns = [dist.new_group([t + tensor * p for p in range(pipeline)]) for t in range(tensor)]
        rows = [dist.new_group([t + tensor * p for t in range(tensor)]) for p in range(pipeline)]
        groups[pipeline] = columns, rows
    columns, rows = groups[pipeline]
    mine, part = divmod(rank, tensor)
    return (
        Axis("pipeline", pipeline, mine, columns[part]),
        Axis("tensor", tensor, part, rows[mine] if tensor > 1 else None),
    )


def build(case: Case, axis: Axis, tensor: Axis, dtype: torch.dtype, fold) -> tuple[Pipeline, dict[int, ToyStage]]:
    total = num_stages(case.schedule, case.pipeline, case.stages_per_rank)
    numbers = stage_numbers(case.schedule, case.pipeline, case.stages_per_rank, axis.rank)
    part = (tensor.rank, tensor.size)
    stages = {n: ToyStage(n, total, case.recompute, tensor.group, part).to(dtype) for n in numbers}
    if case.share:
        for n in numbers[1:]:
            stages[n].cond = stages[numbers[0]].cond
    hidden = torch.empty(TOKENS, WIDTH, dtype=dtype, device="meta")
    return Pipeline(axis, stages, total, case.schedule, torch.device("cpu"), fold, hidden), stages


def worst(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300))


def gradient_error(case: Case, stages: dict[int, ToyStage], single: OneProcess, axis: Axis, tensor: Axis) -> float:
    """The worst over this rank's parameters; consumes the gradients. All ranks of the axis must call it."""
    worst_one = 0.0
    shared = {id(stage.cond): stage.cond for stage in stages.values()}.values()
    for name, wanted in single.stages[0].cond.named_parameters():
        total = sum(cond.get_parameter(name).grad for cond in shared)
        dist.all_reduce(total, group=axis.group)
        worst_one = max(worst_one, worst(total, wanted.grad))
    for n, stage in stages.items():
        for name, parameter in stage.named_parameters():
            wanted = single.stages[n].get_parameter(name).grad
            if name in ("frozen", "unused"):
                assert parameter.grad is None and wanted is None
            elif not name.startswith("cond"):
                if name in ("block.up", "block.down"):  # the other part's gradient is zero here
                    dist.all_reduce(parameter.grad, group=tensor.group) if tensor.is_split else None
                worst_one = max(worst_one, worst(parameter.grad, wanted))
    for module in (*stages.values(), *single.stages):
        for parameter in module.parameters():
            parameter.grad = None
    return worst_one


def run_case(case: Case, axis: Axis, tensor: Axis) -> dict:
    dtype = torch.float64
    pipeline, stages = build(case, axis, tensor, dtype, lambda stage: None)
    single = OneProcess(len(pipeline.owners), dtype)
    has_last = len(pipeline.owners) - 1 in stages
    found = {"gradients": [], "losses": [], "calls": [], "predictions": []}
    for turn, num_packs in enumerate((case.packs, case.packs, 2 * case.packs)):
        packs = [make_pack(17 * turn + n, dtype) for n in range(num_packs)]
        losses: dict[int, list[float]] = {}

        def loss(prediction, number, packs=packs, losses=losses):
            value = toy_loss(packs)(prediction, number)
            losses.setdefault(number, []).append(value.item())
            return value

        pipeline.train(packs, loss)
        wanted = single.train(packs, toy_loss(packs))
        found["gradients"].append(gradient_error(case, stages, single, axis, tensor))
        found["calls"].append(sorted((n, len(values)) for n, values in losses.items()))
        if has_last:
            found["losses"].append(max(abs(losses[n][0] - wanted[n]) / abs(wanted[n]) for n in losses))

        few = packs[: 1 + turn]
        predicted = pipeline.predict(few)
        assert (predicted is not None) == has_last
        if has_last:
            assert len(predicted) == len(few) and not any(p.requires_grad for p in predicted)
            with torch.no_grad():
                found["predictions"].append(
                    max(worst(p, single.predict(q)) for p, q in zip(predicted, few, strict=True))
                )
    found["has_last"] = has_last
    found["packs"] = [case.packs, case.packs, 2 * case.packs]
    gc.collect()
    found["held"] = num_held()
    return found


def num_held() -> int:
    """Tensors of the shape that crosses, and graphs with an MLP in them, as far as Python sees them."""
    return sum(
        type(x).__name__ == "SplitMLPBackward"
        or (type(x) is torch.Tensor and x.shape == (TOKENS, WIDTH) and x.device.type != "meta")
        for x in gc.get_objects()
    )


def run_peak(case: Case, axis: Axis, tensor: Axis) -> list[int]:
    """The most that the last stage's rank holds, for the case's packs and for twice as many."""
    pipeline, _ = build(case, axis, tensor, torch.float64, lambda stage: None)
    peaks = []
    gc.collect()
    for num_packs in (case.packs, 2 * case.packs):
        packs = [make_pack(n, torch.float64) for n in range(num_packs)]
        held = [0]

        def loss(prediction, number, packs=packs, held=held):
            held.append(num_held())
            return toy_loss(packs)(prediction, number)

        pipeline.train(packs, loss)
        peaks.append(max(held))
    return peaks


class FP32Sums:
    """Folds bf16 gradients into fp32 sums, and counts how often it was asked to."""

    def __init__(self):
        self.sums, self.calls = {}, {}

    def __call__(self, stage):
        self.calls[id(stage)] = self.calls.get(id(stage), 0) + 1
        for parameter in stage.parameters():
            if parameter.grad is not None:
                total = self.sums.setdefault(parameter, torch.zeros(parameter.shape))
                total += parameter.grad.float()
                parameter.grad = None


def run_fold(case: Case, axis: Axis, tensor: Axis) -> dict:
    fold, wanted = FP32Sums(), FP32Sums()
    pipeline, stages = build(case, axis, tensor, torch.bfloat16, fold)
    single = OneProcess(len(pipeline.owners), torch.bfloat16)
    packs = [make_pack(n, torch.bfloat16) for n in range(case.packs)]
    pipeline.train(packs, toy_loss(packs))
    single.train(packs, toy_loss(packs), wanted)
    names = [(n, name) for n, stage in stages.items() for name, p in stage.named_parameters() if p in fold.sums]
    own = [(n, name) for n, name in names if not name.startswith("cond")]
    pairs = [
        (fold.sums[stages[n].get_parameter(name)], wanted.sums[single.stages[n].get_parameter(name)]) for n, name in own
    ]
    left = [p for stage in stages.values() for p in stage.parameters() if p.grad is not None]
    calls = sorted(fold.calls.values())
    return {"error": max(worst(a, b) for a, b in pairs), "calls": calls, "left": len(left), "compared": len(own)}


def run_refusal(axis: Axis, tensor: Axis) -> str:
    """What the rank of a stage that fails raises. The others lose their connection."""

    class Refuses(nn.Module):
        def forward(self, pack, hidden):
            raise MegaSoraError("data.shards: a bad pack")

    case = Case("1f1b", 2, 2)
    pipeline, _ = build(case, axis, tensor, torch.float64, lambda stage: None)
    pipeline.stages[0].submod.stage = Refuses() if axis.rank == 0 else pipeline.modules[1]
    packs = [make_pack(n, torch.float64) for n in range(2)]
    try:
        pipeline.train(packs, toy_loss(packs))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def rank_main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    groups: dict = {}
    results = {}
    for case in CASES[world]:
        results[str(case)] = run_case(case, *axes_of(world, case.pipeline, rank, groups))
    if world == 2:
        axes = axes_of(2, 2, rank, groups)
        for case in FOLDS:
            results[f"fold-{case}"] = run_fold(case, *axes)
        for case in PEAKS:
            results[f"peak-{case}"] = run_peak(case, *axes)
        results["refusal"] = run_refusal(*axes)
    torch.save(results, folder / f"rank{rank}.pt")


FOLDS = [
    Case("1f1b", 2, 4),
    Case("interleaved", 2, 4, 2),
    Case("zbv", 2, 6),
    Case("zbv", 2, 5, recompute=True),
]
PEAKS = [Case("1f1b", 2, 4), Case("interleaved", 2, 6, 2), Case("zbv", 2, 4)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """measured(world, name): what each of `world` ranks found."""
    done: dict[int, list[dict]] = {}

    def of(world: int, name: str) -> list:
        if world not in done:
            folder = tmp_path_factory.mktemp(f"ranks{world}")
            command = [sys.executable, __file__, str(folder), str(world)]
            run = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
            assert run.returncode == 0, run.stdout + run.stderr
            done[world] = [torch.load(folder / f"rank{r}.pt") for r in range(world)]
        return [results[name] for results in done[world]]

    return of


each_case = pytest.mark.parametrize(
    ("world", "case"), [(world, case) for world, cases in CASES.items() for case in cases], ids=str
)


# --- the tests


@each_case
def test_gradients_are_those_of_one_process(measured, world, case):
    errors = [error for found in measured(world, str(case)) for error in found["gradients"]]
    assert len(errors) == 3 * world and max(errors) < 1e-10


@each_case
def test_losses_are_those_of_one_process_each_computed_once_where_the_last_stage_is(measured, world, case):
    for found in measured(world, str(case)):
        once = [[(number, 1) for number in range(packs)] for packs in found["packs"]]
        assert found["calls"] == (once if found["has_last"] else [[], [], []])
        assert all(error < 1e-10 for error in found["losses"])
    assert sum(found["has_last"] for found in measured(world, str(case))) == case.tensor


@each_case
def test_predictions_are_those_of_one_process_for_any_number_of_packs(measured, world, case):
    errors = [error for found in measured(world, str(case)) for error in found["predictions"]]
    assert len(errors) == 3 * case.tensor and max(errors) < 1e-10


@pytest.mark.parametrize(  # gloo's threads hold what they summed a moment longer: not the cases that sum
    ("world", "case"), [(world, case) for world, cases in CASES.items() for case in cases if case.tensor == 1], ids=str
)
def test_no_hidden_tokens_are_held_between_steps(measured, world, case):
    assert [found["held"] for found in measured(world, str(case))] == [0] * world


@pytest.mark.parametrize("case", PEAKS, ids=str)
def test_what_is_held_during_a_step_does_not_grow_with_its_packs(measured, case):
    few, many = max(measured(2, f"peak-{case}"))  # of the rank with the last stage; zeros elsewhere
    assert few == many > 0


@pytest.mark.parametrize("case", FOLDS, ids=str)
def test_gradients_of_each_pack_can_be_summed_in_higher_precision(measured, case):
    for found in measured(2, f"fold-{case}"):
        parts = 2 if case.schedule == "zbv" else 1  # of a backward pass
        stages = 1 if case.schedule == "1f1b" else 2
        assert found["calls"] == [parts * case.packs] * stages
        assert found["left"] == 0 and found["compared"] >= 5 * stages
        assert found["error"] < 1e-6  # a sum in bf16 is wrong by 1e-3


def test_an_error_for_people_comes_out_of_a_stage_as_it_is(measured):
    first, second = measured(2, "refusal")
    assert first == "MegaSoraError: data.shards: a bad pack"
    assert second != "nothing"


@pytest.mark.parametrize("recompute", [False, True])
def test_linear_layers_put_their_gradient_off_and_lose_nothing(recompute):
    later = WeightGradients()
    stage, plain = (ToyStage(0, 2, recompute) for _ in range(2))
    apply_later(stage, later)
    pack = make_pack(3, torch.float32)
    stage(pack, None).square().sum().backward()
    plain(pack, None).square().sum().backward()
    linears = {name for name, module in stage.named_modules() if isinstance(module, nn.Linear)}
    late = {f"{name}.{kind}" for name in linears for kind in ("weight", "bias")}
    for name, parameter in plain.named_parameters():
        found = stage.get_parameter(name).grad
        assert (found is None) == (name in late or parameter.grad is None)
    rest = later.take()
    assert all(stage.get_parameter(name).grad is None for name in late if "mix.bias" not in name)
    rest()
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(stage.get_parameter(name).grad, parameter.grad)
    assert not later.waiting


def test_what_is_put_off_belongs_to_the_pack_it_was_taken_for():
    later, linear = WeightGradients(), nn.Linear(3, 2)
    apply_later(linear, later)
    first, second = torch.randn(5, 3), torch.randn(4, 3)
    linear(first).sum().backward()
    of_first = later.take()
    linear(second).sum().backward()
    of_second = later.take()
    of_second()
    torch.testing.assert_close(linear.weight.grad, second.sum(0).expand(2, 3))
    of_first()
    torch.testing.assert_close(linear.weight.grad, (first.sum(0) + second.sum(0)).expand(2, 3))


def test_a_module_of_its_own_kind_may_put_its_gradient_off_too():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, owner, weight):
            ctx.save_for_backward(x, weight)
            ctx.owner = owner
            return x * weight

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            ctx.owner.later(ctx.owner.weight, lambda: (grad * x).sum(0))
            return grad * weight, None, None

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.later = nn.Parameter(torch.ones(3)), None

        def forward(self, x):
            return Product.apply(x, self, self.weight)

    later, scale = WeightGradients(), Scale()
    apply_later(scale, later)
    x = torch.randn(4, 3)
    scale(x).sum().backward()
    assert scale.weight.grad is None
    later.take()()
    torch.testing.assert_close(scale.weight.grad, x.sum(0))


def test_recomputing_happens_once_in_a_backward_pass_in_two_parts():
    later, stage, runs = WeightGradients(), ToyStage(0, 2, recompute=True), []
    apply_later(stage, later)
    stage.block.register_forward_pre_hook(lambda *_: runs.append(1))
    stage(make_pack(0, torch.float32), None).sum().backward()
    later.take()()
    assert len(runs) == 2  # forward, and once again


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
@pytest.mark.parametrize("pipeline", [2, 3, 4, 8])
def test_every_stage_is_on_one_rank_and_neighbours_are_next_to_each_other(schedule, pipeline):
    per_rank = 3 if schedule == "interleaved" else 1
    held = [stage_numbers(schedule, pipeline, per_rank, rank) for rank in range(pipeline)]
    total = num_stages(schedule, pipeline, per_rank)
    assert sorted(sum(held, [])) == list(range(total))
    assert len({len(stages) for stages in held}) == 1
    owners = [rank_of_stage(schedule, pipeline, stage) for stage in range(total)]
    hops = [(b - a) % pipeline for a, b in zip(owners, owners[1:], strict=False)]
    if schedule == "zbv":
        assert hops == [1] * (pipeline - 1) + [0] + [pipeline - 1] * (pipeline - 1) and owners[-1] == 0
    else:
        assert hops == [1] * (total - 1)


def test_known_placements():
    assert [stage_numbers("1f1b", 3, 1, r) for r in range(3)] == [[0], [1], [2]]
    assert [stage_numbers("interleaved", 2, 2, r) for r in range(2)] == [[0, 2], [1, 3]]
    assert [stage_numbers("zbv", 3, 1, r) for r in range(3)] == [[0, 5], [1, 4], [2, 3]]


def torch_can_schedule(schedule: str, pipeline: int, packs: int) -> bool:
    """Asks torch itself, with stages that are numbers alone."""
    total = num_stages(schedule, pipeline, 2)
    stages = [
        SimpleNamespace(stage_index=n, num_stages=total, group_size=pipeline, group_rank=0, submod=None)
        for n in stage_numbers(schedule, pipeline, 2, 0)
    ]
    try:
        if schedule == "1f1b":
            Schedule1F1B(stages[0], packs)
        elif schedule == "interleaved":
            ScheduleInterleaved1F1B(stages, packs)
        else:
            ScheduleZBVZeroBubble(stages, packs)
    except (ValueError, AssertionError):
        return False
    return True


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
def test_just_the_numbers_of_packs_are_accepted_that_torch_can_schedule(schedule):
    for pipeline in (2, 3, 4):
        for packs in range(1, 14):
            try:
                check_microbatches(schedule, pipeline, packs, 1)
                accepted = True
            except MegaSoraError:
                accepted = False
            assert accepted == torch_can_schedule(schedule, pipeline, packs), (pipeline, packs)


@pytest.mark.parametrize(
    ("schedule", "pipeline", "packs", "data", "remedy"),
    [("1f1b", 4, 6, 2, "8"), ("interleaved", 4, 9, 1, "8 or 10"), ("interleaved", 4, 22, 2, "20 or 24")],
)
def test_a_refused_number_of_packs_names_the_keys_and_numbers_that_fit(schedule, pipeline, packs, data, remedy):
    with pytest.raises(MegaSoraError) as error:
        check_microbatches(schedule, pipeline, packs, data)
    for text in (f"data.packs_per_step={packs}", f"parallel.schedule={schedule}", f"parallel.pipeline={pipeline}"):
        assert text in str(error.value)
    assert str(error.value).endswith(f"use data.packs_per_step={remedy}")
    for number in remedy.split(" or "):
        check_microbatches(schedule, pipeline, int(number), data)


if __name__ == "__main__":
    place, size = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    gc.freeze()  # what the imports made is none of num_held's business
    context = torch.multiprocessing.get_context("fork")  # torch is imported once
    ranks = [context.Process(target=rank_main, args=(rank, size, place)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in ranks))
