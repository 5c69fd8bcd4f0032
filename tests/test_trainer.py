"""The training loop with a task that is no VideoDiT: a linear regression with plain torch AdamW, data parallel."""

import json

import pytest
import torch
import torch.distributed as dist

from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.config import load
from megasora.errors import NonFiniteError, StopRequested
from megasora.fragment import Fragment
from megasora.parallel.world import World
from megasora.placement import Placement
from megasora.run_log.ledger import read_ledger
from megasora.tasks.task import StepMetrics, StepOutput
from megasora.testing.spawn import run_ranks
from megasora.trainer import Trainer

FEATURES, EXAMPLES_PER_STEP, STEPS = 5, 8, 12


class LinearRegression:
    """y = w x with known w. Example i of step s is drawn from the seed (s, i); ranks take every n-th example."""

    num_parameters = FEATURES

    def __init__(self, world, diverges_at=None):
        self.world, self.diverges_at, self.position = world, diverges_at, 0
        self.weight = torch.zeros(FEATURES, requires_grad=True)
        self.adam = torch.optim.AdamW([self.weight], lr=0.0, weight_decay=0.0)
        self.adam.state[self.weight] = {
            "step": torch.zeros(()), "exp_avg": torch.zeros(FEATURES), "exp_avg_sq": torch.zeros(FEATURES),
        }  # fmt: skip

    def run_info(self):
        return {"layout": {"data": self.world.size}, "clips": 0, "tokens_per_step": EXAMPLES_PER_STEP}

    def fragments(self):
        state = self.adam.state[self.weight]
        values = {"weights": self.weight.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        return [Fragment("weight", self.weight.shape, Placement(), 0, 1, 0, values)]

    def is_primary(self, fragment):
        return self.world.is_main

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state, step):
        self.position = state["position"]
        self.adam.state[self.weight]["step"].fill_(step)

    def batches(self):
        while True:
            ids = range(self.position + self.world.rank, self.position + EXAMPLES_PER_STEP, self.world.size)
            generators = [torch.Generator().manual_seed(i) for i in ids]
            yield list(ids), torch.stack([torch.randn(FEATURES, generator=g) for g in generators])

    def sample_ids(self, batch):
        return batch[0]

    def flops(self, batch):
        return 0.0

    def train_step(self, batch, step, lr, lap):
        error = ((self.weight - torch.arange(1.0, FEATURES + 1)) * batch[1]).sum(1).square().sum()
        if step + 1 == self.diverges_at:
            error = error * float("nan")
        (error / EXAMPLES_PER_STEP).backward()
        dist.all_reduce(self.weight.grad)
        lap("backward")
        norm = float(self.weight.grad.norm())
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.adam.zero_grad()
        return StepOutput(norm, EXAMPLES_PER_STEP, {"squared_error": error.detach()})

    def finish_step(self, batch, output, totals, step):
        self.position += EXAMPLES_PER_STEP
        return StepMetrics(totals["squared_error"] / output.loss_count, EXAMPLES_PER_STEP, {"position": self.position})

    def validate(self):
        return {"loss": float(self.weight.detach().square().sum())} if self.world.is_main else None


def train_linear(folder, stop_after=None, diverges_at=None):
    """One launch on each rank; the name and message of the error that ended it, or None."""
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, rank, size, torch.device("cpu"))
    every = ["checkpoint.every=4", "validation.every=6", "run.ledger=true"]
    optim = ["optim.lr=0.5", "optim.warmup_steps=2", "wandb.mode=disabled"]
    config = load(None, [f"run.steps={STEPS}", f"run.dir={folder}", *every, *optim])
    activities = []
    trainer = Trainer(
        config,
        world,
        LinearRegression(world, diverges_at),
        lambda: rank == size - 1 and trainer.step + 1 == stop_after,
        activities.append,
    )
    try:
        trainer.run()
    except (StopRequested, NonFiniteError) as error:
        return f"{type(error).__name__}: {error}"
    return activities


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoint_of(folder):
    checkpoint = ShardedCheckpoint(folder / "checkpoints" / f"step-{STEPS:08d}")
    assert checkpoint.kinds == {"weights", "ema", "exp_avg", "exp_avg_sq"}
    return {kind: checkpoint.full_tensor(kind, "weight") for kind in checkpoint.kinds}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linear") / "run"
    return folder, run_ranks(train_linear, 2, str(folder))


def test_the_loop_trains_logs_validates_and_saves_a_task_that_it_does_not_know(uninterrupted):
    folder, (activities, _) = uninterrupted
    metrics = metrics_of(folder)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert metrics[-1]["loss"] < metrics[0]["loss"] / 10
    assert metrics[1]["lr"] == 0.5 and metrics[-1]["position"] == STEPS * EXAMPLES_PER_STEP
    validation = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in validation] == [0, 6, 12]
    ids = read_ledger(folder)
    assert [i for step in ids.values() for i in step] == list(range(STEPS * EXAMPLES_PER_STEP))
    start = ["loading the newest checkpoint", "the validation after step 0", "the loader, for step 1", "step 1"]
    assert activities[:4] == start
    assert activities[-2:] == ["the validation after step 12", "the save after step 12"]


def test_a_stop_on_one_rank_and_a_resume_change_nothing(uninterrupted, tmp_path):
    ends = run_ranks(train_linear, 2, str(tmp_path), 5)
    assert ends == ["StopRequested: saved after step 5; the same command resumes from there"] * 2
    run_ranks(train_linear, 2, str(tmp_path))
    whole, resumed = metrics_of(uninterrupted[0]), metrics_of(tmp_path)
    assert [(m["loss"], m["grad_norm"]) for m in resumed] == [(m["loss"], m["grad_norm"]) for m in whole]
    assert read_ledger(tmp_path) == read_ledger(uninterrupted[0])
    expected, saved = checkpoint_of(uninterrupted[0]), checkpoint_of(tmp_path)
    assert all(torch.equal(saved[kind], expected[kind]) for kind in expected)


def test_a_loss_that_is_not_finite_names_its_step_and_the_remedy(tmp_path):
    (message,) = run_ranks(train_linear, 1, str(tmp_path), None, 6)
    assert message == (
        "NonFiniteError: step 6: loss nan, gradient norm nan; start another run.dir with optim.lr below 0.5, "
        f"if need be from these weights: model.init_from={tmp_path}/checkpoints/step-00000004"
    )
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2, 3, 4, 5]
