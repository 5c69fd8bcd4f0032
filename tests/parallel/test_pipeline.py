"""A pipeline of toy stages gives the losses, gradients and predictions of the same stages in one process.

Run as a script with a folder and a number of ranks, this file starts those ranks: each runs all cases and saves its
results to the folder. The tests start it once for each number of ranks and compare the results.
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
from megasora.parallel.pipeline import Pipeline, check_microbatches, num_stages, rank_of_stage, stage_numbers
from megasora.parallel.weight_grad_store import DefersWeightGrad, WeightGradStore, apply_deferred_weight_grads

TOKENS, WIDTH, PATCH, HIDDEN = 11, 6, 4, 8  # all different, so that no two shapes agree by accident


@dataclass(frozen=True)
class Case:
    schedule: str
    pipeline: int
    packs: int
    stages_per_rank: int = 1
    recompute: bool = False
    tensor: int = 1  # ranks over which the MLP matrices are sharded, with collectives in both passes
    tied: bool = False  # the stages of a rank have one copy of the conditioning weights

    def __str__(self) -> str:
        parts = (
            self.schedule,
            f"{self.pipeline}x{self.stages_per_rank}",
            f"{self.packs}packs",
            "recompute" * self.recompute,
            "tensor" * (self.tensor > 1),
            "tied" * self.tied,
        )
        return "-".join(part for part in parts if part)


CASES = {
    2: [
        Case("1f1b", 2, 2),
        Case("1f1b", 2, 5, recompute=True),
        Case("interleaved", 2, 2, 2),
        Case("interleaved", 2, 6, 2, recompute=True, tied=True),
        Case("interleaved", 2, 4, 3),
        Case("zbv", 2, 1),
        Case("zbv", 2, 3),
        Case("zbv", 2, 6, recompute=True, tied=True),
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


# --- the toy model: the features of a DiT that matter to a pipeline, and nothing else


@dataclass(frozen=True)
class ToyPack:
    patches_LP: torch.Tensor
    level: torch.Tensor
    target_LP: torch.Tensor
    clips: tuple[int, ...]  # tokens of each: not a tensor, not a static shape


def make_pack(seed: int, dtype: torch.dtype, tokens: int = TOKENS) -> ToyPack:
    draw = torch.Generator().manual_seed(seed)
    patches, target = (torch.randn(tokens, PATCH, generator=draw, dtype=torch.float64).to(dtype) for _ in range(2))
    first = 1 + seed % (tokens - 1)
    return ToyPack(patches, torch.rand(1, generator=draw).to(dtype), target, (first, tokens - first))


class ShardedMLP(torch.autograd.Function):
    """(x W1^T) W2^T, with the hidden dim sharded over `group`. Computes only the gradients that are needed."""

    @staticmethod
    def forward(ctx, x, up, down, group):
        inner = x @ up.t()
        ctx.save_for_backward(x, up, down, inner)
        ctx.group = group
        return all_reduce(inner @ down.t(), group)

    @staticmethod
    def backward(ctx, grad):
        x, up, down, inner = ctx.saved_tensors
        grad_inner = grad @ down
        grad_x = all_reduce(grad_inner @ up, ctx.group) if ctx.needs_input_grad[0] else None
        grad_up = grad_inner.t() @ x if ctx.needs_input_grad[1] else None
        grad_down = grad.t() @ inner if ctx.needs_input_grad[2] else None
        return grad_x, grad_up, grad_down, None


def all_reduce(x, group):
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


class ToyBlock(nn.Module):
    def __init__(self, group, tensor_rank, tensor_size):
        super().__init__()
        self.group, self.tensor_rank, self.tensor_size = group, tensor_rank, tensor_size
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Parameter(torch.empty(HIDDEN, WIDTH))
        self.down = nn.Parameter(torch.empty(WIDTH, HIDDEN))

    def forward(self, x, cond, clips):
        shift, scale, gate = self.modulation(F.silu(cond)).chunk(3, -1)
        y = self.norm(x) * (1 + scale) + shift
        y = torch.cat([clip + self.mix(clip).mean(0) for clip in y.split(clips)])  # tokens of a clip interact
        up = self.up.chunk(self.tensor_size)[self.tensor_rank]
        down = self.down.chunk(self.tensor_size, 1)[self.tensor_rank]
        return x + gate * ShardedMLP.apply(y, up, down, self.group).tanh()


class ToyStage(nn.Module):
    """Like a stage of the model: replicated conditioning and a block; the first also embeds, the last also projects."""

    def __init__(self, number, total, recompute=False, group=None, tensor_rank=0, tensor_size=1):
        super().__init__()
        self.recompute = recompute
        self.frozen = nn.Parameter(torch.ones(WIDTH), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(WIDTH))
        self.block = ToyBlock(group, tensor_rank, tensor_size)
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
        # Not contiguous, as a message must be: the pipeline has to copy it.
        return x.t().contiguous().t() if self.patch_out is None else self.patch_out(x)


def toy_loss(packs):
    # the gradient of sum() is an expanded tensor
    return lambda prediction, m: ((prediction - packs[m].target_LP) ** 2 * (1 + m)).mean(1).sum()


class OneProcess:
    """All stages of a case in sequence, with one copy of the conditioning, as in a model without a pipeline."""

    def __init__(self, total: int, dtype: torch.dtype):
        self.stages = [ToyStage(n, total).to(dtype) for n in range(total)]
        for stage in self.stages[1:]:
            stage.cond = self.stages[0].cond

    def forward(self, pack):
        x = None
        for stage in self.stages:
            x = stage(pack, x)
        return x

    def forward_backward(self, packs, loss, accumulate_grads=lambda stage: None):
        losses = []
        for microbatch, pack in enumerate(packs):
            losses.append(loss(self.forward(pack), microbatch))
            losses[-1].backward()
            for stage in self.stages:
                accumulate_grads(stage)
        return [value.item() for value in losses]


# --- the ranks


def axes_of(world: int, pipeline: int, rank: int, groups: dict) -> tuple[Axis, Axis]:
    """The pipeline axis and, inside it, the tensor axis, as the mesh would build them."""
    tensor = world // pipeline
    if pipeline not in groups:
        pipeline_groups = [dist.new_group([t + tensor * p for p in range(pipeline)]) for t in range(tensor)]
        tensor_groups = [dist.new_group([t + tensor * p for t in range(tensor)]) for p in range(pipeline)]
        groups[pipeline] = pipeline_groups, tensor_groups
    pipeline_groups, tensor_groups = groups[pipeline]
    pipeline_rank, tensor_rank = divmod(rank, tensor)
    return (
        Axis("pipeline", pipeline, pipeline_rank, pipeline_groups[tensor_rank]),
        Axis("tensor", tensor, tensor_rank, tensor_groups[pipeline_rank] if tensor > 1 else None),
    )


def build(
    case: Case, axis: Axis, tensor: Axis, dtype: torch.dtype, accumulate_grads=lambda stage: None
) -> tuple[Pipeline, dict[int, ToyStage]]:
    total = num_stages(case.schedule, case.pipeline, case.stages_per_rank)
    numbers = stage_numbers(case.schedule, case.pipeline, case.stages_per_rank, axis.rank)
    shard = (tensor.group, tensor.rank, tensor.size)
    stages = {n: ToyStage(n, total, case.recompute, *shard).to(dtype) for n in numbers}
    if case.tied:
        for n in numbers[1:]:
            stages[n].cond = stages[numbers[0]].cond
    hidden = torch.empty(TOKENS, WIDTH, dtype=dtype, device="meta")
    length = lambda pack: len(pack.patches_LP)  # noqa: E731
    return Pipeline(axis, stages, total, case.schedule, torch.device("cpu"), accumulate_grads, hidden, length), stages


def max_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def gradient_error(case: Case, stages: dict[int, ToyStage], single: OneProcess, axis: Axis, tensor: Axis) -> float:
    """The largest error over this rank's parameters; clears all gradients. All ranks of the axis must call it."""
    errors = []
    conditionings = {id(stage.cond): stage.cond for stage in stages.values()}.values()
    for name, expected in single.stages[0].cond.named_parameters():
        total = sum(cond.get_parameter(name).grad for cond in conditionings)
        dist.all_reduce(total, group=axis.group)
        errors.append(max_error(total, expected.grad))
    for n, stage in stages.items():
        for name, parameter in stage.named_parameters():
            expected = single.stages[n].get_parameter(name).grad
            if name in ("frozen", "unused"):
                assert parameter.grad is None and expected is None
            elif not name.startswith("cond"):
                if name in ("block.up", "block.down"):  # zero outside this rank's shard
                    dist.all_reduce(parameter.grad, group=tensor.group) if tensor.is_split else None
                errors.append(max_error(parameter.grad, expected))
    for module in (*stages.values(), *single.stages):
        for parameter in module.parameters():
            parameter.grad = None
    return max(errors)


def run_case(case: Case, axis: Axis, tensor: Axis) -> dict:
    dtype = torch.float64
    pipeline, stages = build(case, axis, tensor, dtype)
    single = OneProcess(len(pipeline.stage_ranks), dtype)
    has_last = len(pipeline.stage_ranks) - 1 in stages
    results = {"gradients": [], "losses": [], "calls": [], "predictions": []}
    for step, num_packs in enumerate((case.packs, case.packs, 2 * case.packs)):
        packs = [make_pack(17 * step + n, dtype) for n in range(num_packs)]
        losses: dict[int, list[float]] = {}

        def loss(prediction, microbatch, packs=packs, losses=losses):
            value = toy_loss(packs)(prediction, microbatch)
            losses.setdefault(microbatch, []).append(value.item())
            return value

        pipeline.forward_backward(packs, loss)
        expected = single.forward_backward(packs, toy_loss(packs))
        results["gradients"].append(gradient_error(case, stages, single, axis, tensor))
        results["calls"].append(sorted((n, len(values)) for n, values in losses.items()))
        if has_last:
            results["losses"].append(max(abs(losses[n][0] - expected[n]) / abs(expected[n]) for n in losses))

        few = [*packs[: 1 + step], make_pack(step, dtype, tokens=2 * TOKENS + step)]  # one longer than in training
        predicted = pipeline.forward_only(few)
        assert (predicted is not None) == has_last
        if has_last:
            assert len(predicted) == len(few) and not any(p.requires_grad for p in predicted)
            with torch.no_grad():
                errors = [max_error(p, single.forward(pack)) for p, pack in zip(predicted, few, strict=True)]
            results["predictions"].append(max(errors))
    results["has_last"] = has_last
    results["packs"] = [case.packs, case.packs, 2 * case.packs]
    gc.collect()
    results["num_live"] = num_live()
    return results


def num_live() -> int:
    """The number of live tensors of the shape that is sent, and of autograd graphs with an MLP, as Python sees them."""
    return sum(
        type(x).__name__ == "ShardedMLPBackward"
        or (type(x) is torch.Tensor and x.shape == (TOKENS, WIDTH) and x.device.type != "meta")
        for x in gc.get_objects()
    )


def run_peak(case: Case, axis: Axis, tensor: Axis) -> list[int]:
    """The peak of `num_live` on the rank of the last stage, for the case's packs and for twice as many."""
    pipeline, _ = build(case, axis, tensor, torch.float64)
    peaks = []
    gc.collect()
    for num_packs in (case.packs, 2 * case.packs):
        packs = [make_pack(n, torch.float64) for n in range(num_packs)]
        counts = [0]

        def loss(prediction, microbatch, packs=packs, counts=counts):
            counts.append(num_live())
            return toy_loss(packs)(prediction, microbatch)

        pipeline.forward_backward(packs, loss)
        peaks.append(max(counts))
    return peaks


class FP32Sums:
    """Adds bf16 gradients to fp32 sums, and counts its calls for each stage."""

    def __init__(self):
        self.sums, self.calls = {}, {}

    def __call__(self, stage):
        self.calls[id(stage)] = self.calls.get(id(stage), 0) + 1
        for parameter in stage.parameters():
            if parameter.grad is not None:
                total = self.sums.setdefault(parameter, torch.zeros(parameter.shape))
                total += parameter.grad.float()
                parameter.grad = None


def run_accumulation(case: Case, axis: Axis, tensor: Axis) -> dict:
    actual, expected = FP32Sums(), FP32Sums()
    pipeline, stages = build(case, axis, tensor, torch.bfloat16, actual)
    single = OneProcess(len(pipeline.stage_ranks), torch.bfloat16)
    packs = [make_pack(n, torch.bfloat16) for n in range(case.packs)]
    pipeline.forward_backward(packs, toy_loss(packs))
    single.forward_backward(packs, toy_loss(packs), expected)
    names = [(n, name) for n, stage in stages.items() for name, p in stage.named_parameters() if p in actual.sums]
    own = [(n, name) for n, name in names if not name.startswith("cond")]
    pairs = [
        (actual.sums[stages[n].get_parameter(name)], expected.sums[single.stages[n].get_parameter(name)])
        for n, name in own
    ]
    left = [p for stage in stages.values() for p in stage.parameters() if p.grad is not None]
    calls = sorted(actual.calls.values())
    return {"error": max(max_error(a, b) for a, b in pairs), "calls": calls, "left": len(left), "compared": len(own)}


def run_failing_stage(axis: Axis, tensor: Axis) -> str:
    """What is raised on the rank of a stage that fails. The others lose their connection."""

    class FailingStage(nn.Module):
        def forward(self, pack, hidden):
            raise MegaSoraError("data.shards: a bad pack")

    case = Case("1f1b", 2, 2)
    pipeline, _ = build(case, axis, tensor, torch.float64)
    pipeline.stages[0].submod.stage = FailingStage() if axis.rank == 0 else pipeline.modules[1]
    packs = [make_pack(n, torch.float64) for n in range(2)]
    try:
        pipeline.forward_backward(packs, toy_loss(packs))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def rank_main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    groups: dict = {}
    results = {}
    for case in CASES[world]:
        results[str(case)] = run_case(case, *axes_of(world, case.pipeline, rank, groups))
    if world == 2:
        axes = axes_of(2, 2, rank, groups)
        for case in ACCUMULATIONS:
            results[f"accumulation-{case}"] = run_accumulation(case, *axes)
        for case in PEAKS:
            results[f"peak-{case}"] = run_peak(case, *axes)
        results["failing stage"] = run_failing_stage(*axes)
    torch.save(results, folder / f"rank{rank}.pt")


ACCUMULATIONS = [
    Case("1f1b", 2, 4),
    Case("interleaved", 2, 4, 2),
    Case("zbv", 2, 6),
    Case("zbv", 2, 5, recompute=True),
]
PEAKS = [Case("1f1b", 2, 4), Case("interleaved", 2, 6, 2), Case("zbv", 2, 4)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """measured(world, name): the results of each of `world` ranks."""
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
    errors = [error for results in measured(world, str(case)) for error in results["gradients"]]
    assert len(errors) == 3 * world and max(errors) < 1e-10


@each_case
def test_losses_are_those_of_one_process_each_computed_once_where_the_last_stage_is(measured, world, case):
    for results in measured(world, str(case)):
        once = [[(microbatch, 1) for microbatch in range(packs)] for packs in results["packs"]]
        assert results["calls"] == (once if results["has_last"] else [[], [], []])
        assert all(error < 1e-10 for error in results["losses"])
    assert sum(results["has_last"] for results in measured(world, str(case))) == case.tensor


@each_case
def test_predictions_are_those_of_one_process_for_any_number_of_packs(measured, world, case):
    errors = [error for results in measured(world, str(case)) for error in results["predictions"]]
    assert len(errors) == 3 * case.tensor and max(errors) < 1e-10


@pytest.mark.parametrize(  # only cases without all-reduce: gloo's threads free its tensors a moment later
    ("world", "case"), [(world, case) for world, cases in CASES.items() for case in cases if case.tensor == 1], ids=str
)
def test_no_hidden_tokens_are_held_between_steps(measured, world, case):
    assert [results["num_live"] for results in measured(world, str(case))] == [0] * world


@pytest.mark.parametrize("case", PEAKS, ids=str)
def test_memory_of_a_step_does_not_grow_with_its_packs(measured, case):
    few, many = max(measured(2, f"peak-{case}"))  # of the rank with the last stage; zeros on the other
    assert few == many > 0


@pytest.mark.parametrize("case", ACCUMULATIONS, ids=str)
def test_gradients_of_each_pack_can_be_summed_in_higher_precision(measured, case):
    for results in measured(2, f"accumulation-{case}"):
        calls_per_pack = 2 if case.schedule == "zbv" else 1
        stages = 1 if case.schedule == "1f1b" else 2
        assert results["calls"] == [calls_per_pack * case.packs] * stages
        assert results["left"] == 0 and results["compared"] >= 5 * stages
        assert results["error"] < 1e-6  # a bf16 sum would be off by 1e-3


def test_an_error_for_people_is_raised_unchanged_from_a_stage(measured):
    first, second = measured(2, "failing stage")
    assert first == "MegaSoraError: data.shards: a bad pack"
    assert second != "nothing"


@pytest.mark.parametrize("recompute", [False, True])
def test_linear_layers_defer_their_weight_gradients_and_lose_none(recompute):
    store = WeightGradStore()
    stage, reference = (ToyStage(0, 2, recompute) for _ in range(2))
    apply_deferred_weight_grads(stage, store)
    pack = make_pack(3, torch.float32)
    stage(pack, None).square().sum().backward()
    reference(pack, None).square().sum().backward()
    linears = {name for name, module in stage.named_modules() if isinstance(module, nn.Linear)}
    deferred = {f"{name}.{kind}" for name in linears for kind in ("weight", "bias")}
    for name, parameter in reference.named_parameters():
        assert (stage.get_parameter(name).grad is None) == (name in deferred or parameter.grad is None)
    accumulate = store.pop()
    assert all(stage.get_parameter(name).grad is None for name in deferred if "mix.bias" not in name)
    accumulate()
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(stage.get_parameter(name).grad, parameter.grad)
    assert not store.deferred


def test_pop_returns_the_gradients_of_one_backward_pass():
    store, linear = WeightGradStore(), nn.Linear(3, 2)
    apply_deferred_weight_grads(linear, store)
    first, second = torch.randn(5, 3), torch.randn(4, 3)
    linear(first).sum().backward()
    accumulate_first = store.pop()
    linear(second).sum().backward()
    accumulate_second = store.pop()
    accumulate_second()
    torch.testing.assert_close(linear.weight.grad, second.sum(0).expand(2, 3))
    accumulate_first()
    torch.testing.assert_close(linear.weight.grad, (first.sum(0) + second.sum(0)).expand(2, 3))


def test_a_module_that_defers_weight_grads_gets_the_store():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, module, weight):
            ctx.save_for_backward(x, weight)
            ctx.module = module
            return x * weight

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            ctx.module.wgrad_store.put(ctx.module.weight, lambda: (grad * x).sum(0))
            return grad * weight, None, None

    class Scale(DefersWeightGrad):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return Product.apply(x, self, self.weight)

    store, scale = WeightGradStore(), Scale()
    apply_deferred_weight_grads(scale, store)
    x = torch.randn(4, 3)
    scale(x).sum().backward()
    assert scale.weight.grad is None
    store.pop()()
    torch.testing.assert_close(scale.weight.grad, x.sum(0))


def test_a_block_is_recomputed_once_where_weight_gradients_are_deferred():
    store, stage, calls = WeightGradStore(), ToyStage(0, 2, recompute=True), []
    apply_deferred_weight_grads(stage, store)
    stage.block.register_forward_pre_hook(lambda *_: calls.append(1))
    stage(make_pack(0, torch.float32), None).sum().backward()
    store.pop()()
    assert len(calls) == 2  # the forward pass, and one recomputation


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
@pytest.mark.parametrize("pipeline", [2, 3, 4, 8])
def test_every_stage_is_on_one_rank_and_consecutive_stages_on_neighbouring_ranks(schedule, pipeline):
    per_rank = 3 if schedule == "interleaved" else 1
    by_rank = [stage_numbers(schedule, pipeline, per_rank, rank) for rank in range(pipeline)]
    total = num_stages(schedule, pipeline, per_rank)
    assert sorted(sum(by_rank, [])) == list(range(total))
    assert len({len(stages) for stages in by_rank}) == 1
    ranks = [rank_of_stage(schedule, pipeline, stage) for stage in range(total)]
    distances = [(b - a) % pipeline for a, b in zip(ranks, ranks[1:], strict=False)]
    if schedule == "zbv":
        assert distances == [1] * (pipeline - 1) + [0] + [pipeline - 1] * (pipeline - 1) and ranks[-1] == 0
    else:
        assert distances == [1] * (total - 1)


def test_known_stages_of_ranks():
    assert [stage_numbers("1f1b", 3, 1, r) for r in range(3)] == [[0], [1], [2]]
    assert [stage_numbers("interleaved", 2, 2, r) for r in range(2)] == [[0, 2], [1, 3]]
    assert [stage_numbers("zbv", 3, 1, r) for r in range(3)] == [[0, 5], [1, 4], [2, 3]]


def torch_can_schedule(schedule: str, pipeline: int, packs: int) -> bool:
    """Whether torch's own schedule accepts the number of packs; its stages have indices and no module."""
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
def test_exactly_the_numbers_of_packs_that_torch_can_schedule_are_accepted(schedule):
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
def test_an_invalid_number_of_packs_raises_with_keys_and_valid_numbers(schedule, pipeline, packs, data, remedy):
    with pytest.raises(MegaSoraError) as error:
        check_microbatches(schedule, pipeline, packs, data)
    for text in (f"data.packs_per_step={packs}", f"parallel.schedule={schedule}", f"parallel.pipeline={pipeline}"):
        assert text in str(error.value)
    assert str(error.value).endswith(f"use data.packs_per_step={remedy}")
    for number in remedy.split(" or "):
        check_microbatches(schedule, pipeline, int(number), data)


if __name__ == "__main__":
    folder, size = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    gc.freeze()  # num_live must not count what the imports created
    context = torch.multiprocessing.get_context("fork")  # torch is imported once
    ranks = [context.Process(target=rank_main, args=(rank, size, folder)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in ranks))
