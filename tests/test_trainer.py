"""The training loop with a task that is no VideoDiT: a linear regression with plain torch AdamW, data parallel."""

import copy
import itertools
import json
import re
import shutil

import pytest
import torch
import torch.distributed as dist

from megasora import training_steps
from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.config import load
from megasora.errors import DataError, NonFiniteError, StopRequested
from megasora.fragment import Fragment
from megasora.optim.schedule import lr_at
from megasora.parallel.world import World
from megasora.placement import Placement
from megasora.run_log.ledger import read_ledger, read_skipped
from megasora.tasks.task import StepMetrics, StepOutput
from megasora.testing.spawn import run_ranks
from megasora.trainer import Trainer

FEATURES, EXAMPLES_PER_STEP, STEPS = 5, 8, 12


class LinearRegression:
    """y = w x with known w. Example i of step s is drawn from the seed (s, i); ranks take every n-th example."""

    num_parameters, defers = FEATURES, True

    def __init__(self, world, factors):
        """`factors`: {step: what the errors of this step are multiplied with}"""
        self.world, self.factors, self.position = world, factors, 0
        self.order = []  # in which gradients are computed and numbers read: (what, step)
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

    def replicas(self, fragment):
        return self.world.rank, self.world.size

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]

    def sync_after_load(self, updates):
        self.adam.state[self.weight]["step"].fill_(updates)

    def batches(self, step):
        for number, position in enumerate(itertools.count(self.position, EXAMPLES_PER_STEP), step + 1):
            if self.factors.get(number) == "unreadable":
                raise DataError(f"the data of step {number} cannot be read")
            ids = range(position + self.world.rank, position + EXAMPLES_PER_STEP, self.world.size)
            generators = [torch.Generator().manual_seed(i) for i in ids]
            yield list(ids), torch.stack([torch.randn(FEATURES, generator=g) for g in generators])

    def sample_ids(self, batch):
        return batch[0]

    def flops(self, batch):
        return 0.0

    def forward_backward(self, batch, step, lap):
        self.order.append(("gradients", step + 1))
        error = ((self.weight - torch.arange(1.0, FEATURES + 1)) * batch[1]).sum(1).square().sum()
        error = error * self.factors.get(step + 1, 1.0)
        (error / EXAMPLES_PER_STEP).backward()
        dist.all_reduce(self.weight.grad)
        lap("backward")
        count = torch.tensor(EXAMPLES_PER_STEP)
        return StepOutput(self.weight.grad.norm(), count, {"squared_error": error.detach()})

    def loss(self, sums, loss_count):
        return sums["squared_error"] / loss_count

    def optimizer_step(self, update):
        if update.apply is None or update.apply:
            self.adam.param_groups[0]["lr"] = update.lr
            self.adam.step()
        self.adam.zero_grad()

    def discard_grads(self):
        self.adam.zero_grad()

    def step_metrics(self, batch, totals, loss, step):
        self.order.append(("numbers", step + 1))
        self.position += EXAMPLES_PER_STEP
        return StepMetrics(EXAMPLES_PER_STEP, {"position": self.position})

    def validate(self):
        return {"loss": float(self.weight.detach().square().sum())} if self.world.is_main else None


def train_linear(folder, stop_after=None, factors=None, settings=(), reads_late=False):
    """One launch on each rank; the name and message of the error that ended it, or the activities of the watchdog.

    `reads_late`: as on a GPU, the numbers of a step are read during the next one.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, rank, size, torch.device("cpu"))
    every = ["checkpoint.every=4", "validation.every=6", "run.ledger=true"]
    optim = ["optim.lr=0.5", "optim.warmup_steps=2", "wandb.mode=disabled"]
    config = load(None, [f"run.steps={STEPS}", f"run.dir={folder}", *every, *optim, *settings])
    activities = []
    trainer = Trainer(
        config,
        world,
        LinearRegression(world, factors or {}),
        lambda: rank == size - 1 and trainer.step + 1 == stop_after,
        activities.append,
    )
    trainer.steps.reads_late = reads_late
    try:
        trainer.run()
    except (StopRequested, NonFiniteError, DataError) as error:
        return f"{type(error).__name__}: {error}"
    return activities


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoint_of(folder, step=STEPS):
    checkpoint = ShardedCheckpoint(folder / "checkpoints" / f"step-{step:08d}")
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
    start = ["choosing a checkpoint", "the validation after step 0", "the loader, for step 1", "step 1"]
    assert activities[:4] == start
    end = activities[activities.index("the validation after step 12") :]
    assert set(end[1:]) - {"the save after step 8"} == {"the save after step 12"}  # while they are written


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
    nan = {step: float("nan") for step in (5, 6)}
    (message,) = run_ranks(train_linear, 1, str(tmp_path), None, nan, ["optim.max_skipped_steps=2"])
    assert message == (
        "NonFiniteError: steps 5 to 6: loss or gradient norm not finite (2 in a row, optim.max_skipped_steps=2); start "
        "another run.dir with optim.lr below 0.5, if need be from these weights: "
        f"run.start=init:{tmp_path}/checkpoints/step-00000004"
    )
    assert [line.get("skipped") for line in metrics_of(tmp_path)] == [None] * 4 + ["non-finite"] * 2


# ---------------------------------------------------------------------- numbers that are read late, as on a GPU


def order_of_steps(folder, settings, factors):
    """(what, step) in the order of a run on one rank whose numbers are read late, see LinearRegression."""
    order = []
    made = LinearRegression.__init__

    def init(self, *arguments):
        made(self, *arguments)
        self.order = order

    LinearRegression.__init__ = init
    train_linear(folder, None, factors, settings, reads_late=True)
    return order


def test_the_next_step_is_launched_before_the_numbers_of_a_step_are_read_unless_its_state_is_needed(tmp_path):
    factors = {8: float("nan"), 9: float("nan")}
    (order,) = run_ranks(order_of_steps, 1, str(tmp_path), ["optim.max_skipped_steps=3"], factors)
    read_at_once = {4, 6, 12}  # saves after 4, 8 and 12, validations after 6 and 12
    read_at_once |= {8, 10}  # a save; and two steps in a row were skipped, so that the next one may end the run
    for step in range(1, STEPS + 1):
        next_gradients = ("gradients", step + 1)
        is_late = next_gradients in order and order.index(("numbers", step)) > order.index(next_gradients)
        assert is_late == (step not in read_at_once), step
    assert [step for what, step in order if what == "numbers"] == list(range(1, STEPS + 1))


def test_late_numbers_change_nothing(uninterrupted, tmp_path):
    run_ranks(train_linear, 2, str(tmp_path), None, None, (), True)
    check_equal_runs(uninterrupted[0], tmp_path, STEPS)


def check_equal_runs(expected, run, steps):
    """Losses, norms, checkpoint, ledger and skipped steps are the same, bit for bit."""
    figures = [[(m["step"], m["loss"], m["grad_norm"], m["lr"]) for m in metrics_of(f)] for f in (expected, run)]
    assert figures[0] == figures[1]
    a, b = checkpoint_of(expected, steps), checkpoint_of(run, steps)
    assert all(torch.equal(a[kind], b[kind]) for kind in a)
    assert read_ledger(expected) == read_ledger(run) and read_skipped(expected) == read_skipped(run)


def test_a_stop_that_is_read_late_stops_after_the_next_step_and_a_resume_changes_nothing(uninterrupted, tmp_path):
    ends = run_ranks(train_linear, 2, str(tmp_path), 5, None, (), True)
    assert ends == ["StopRequested: saved after step 6; the same command resumes from there"] * 2
    run_ranks(train_linear, 2, str(tmp_path), None, None, (), True)
    check_equal_runs(uninterrupted[0], tmp_path, STEPS)


@pytest.mark.parametrize("late", [False, True])
def test_the_step_before_data_that_cannot_be_read_is_logged(late, tmp_path):
    factors = {6: float("nan"), 7: "unreadable"}
    (message,) = run_ranks(train_linear, 1, str(tmp_path), None, factors, ["validation.every=100"], late)
    assert message == "DataError: the data of step 7 cannot be read"
    metrics = metrics_of(tmp_path)
    assert [(m["step"], m.get("skipped")) for m in metrics] == [(i, None) for i in range(1, 6)] + [(6, "non-finite")]
    trained, skipped = read_ledger(tmp_path), read_skipped(tmp_path)
    assert list(trained) == list(range(1, 7)) and list(skipped) == [6]


def test_long_steps_are_read_at_once(tmp_path):
    (order,) = run_ranks(order_of_long_steps, 1, str(tmp_path))
    late = [step for step in range(1, STEPS) if order.index(("numbers", step)) > order.index(("gradients", step + 1))]
    assert late == [1, 2]  # until the time of a step is known


def order_of_long_steps(folder):
    training_steps.LONG_STEP_SECONDS = 0.0
    return order_of_steps(folder, ["checkpoint.every=100", "validation.every=100"], {})


# ---------------------------------------------------------------------- steps that are left out

SPIKES = ["run.steps=20", "optim.spike.threshold=20", "optim.spike.window=4", "optim.spike.patience=3", "optim.lr=0.05"]


def weights_after(applied, rollback=None, steps=20):
    """The weights of a loop in plain PyTorch on one process that takes the steps `applied` only.

    `rollback`: (a, b): after step b, weights and optimizer are those after step a.
    """
    weight = torch.zeros(FEATURES, requires_grad=True)
    adam, saved = torch.optim.AdamW([weight], lr=0.0, weight_decay=0.0), None
    config = load(None, [*SPIKES, "optim.warmup_steps=2"])
    for step in range(1, steps + 1):
        ids = range((step - 1) * EXAMPLES_PER_STEP, step * EXAMPLES_PER_STEP)
        x = torch.stack([torch.randn(FEATURES, generator=torch.Generator().manual_seed(i)) for i in ids])
        error = ((weight - torch.arange(1.0, FEATURES + 1)) * x).sum(1).square().sum()
        (error / EXAMPLES_PER_STEP).backward()
        if step in applied:
            adam.param_groups[0]["lr"] = lr_at(step - 1, config.run.steps, config.optim)
            adam.step()
        adam.zero_grad()
        if rollback is not None and step == rollback[0]:
            saved = weight.detach().clone(), copy.deepcopy(adam.state_dict())
        if rollback is not None and step == rollback[1]:
            weight.data.copy_(saved[0])
            adam.load_state_dict(saved[1])
    return weight.detach()


def test_a_spike_and_a_nan_are_each_skipped_once_and_the_others_are_as_without_them(tmp_path):
    factors = {9: float("nan"), 11: 1e4}
    run_ranks(train_linear, 1, str(tmp_path), None, factors, SPIKES)
    metrics = metrics_of(tmp_path)
    assert {m["step"]: m["skipped"] for m in metrics if "skipped" in m} == {9: "non-finite", 11: "spike"}
    applied = set(range(1, 21)) - set(factors)
    assert torch.equal(checkpoint_of(tmp_path, 20)["weights"], weights_after(applied))
    trained, skipped = read_ledger(tmp_path), read_skipped(tmp_path)
    assert {step for step, ids in trained.items() if ids} == applied and set(skipped) == set(factors)
    assert all(ids == list(range((s - 1) * EXAMPLES_PER_STEP, s * EXAMPLES_PER_STEP)) for s, ids in skipped.items())


def test_skipped_steps_whose_numbers_are_read_late_change_nothing(tmp_path):
    factors = {9: float("nan"), 11: 1e4, 13: float("nan"), 14: float("nan"), 18: 1e4, 19: 1e4}
    for late in (False, True):
        run_ranks(train_linear, 2, str(tmp_path / str(late)), None, factors, SPIKES, late)
    assert set(read_skipped(tmp_path / "True")) == set(factors)
    check_equal_runs(tmp_path / "False", tmp_path / "True", 20)


SUSTAINED = {step: 1e4 for step in (10, 11, 12)}


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollback") / "run"
    run_ranks(train_linear, 2, str(folder), None, SUSTAINED, [*SPIKES, "checkpoint.keep=9"])
    return folder


def test_sustained_spikes_roll_back_and_leave_out_the_steps_since_the_checkpoint(rolled_back):
    metrics = metrics_of(rolled_back)
    assert [m["step"] for m in metrics] == list(range(1, 21))
    assert {m["step"]: m["skipped"] for m in metrics if "skipped" in m} == dict.fromkeys(SUSTAINED, "spike")
    lines = [json.loads(line) for line in (rolled_back / "skipped.jsonl").read_text().splitlines()]
    assert [line.get("rolled_back_to") for line in lines] == [None, None, 8]
    assert {step for step, ids in read_ledger(rolled_back).items() if not ids} == {9, 10, 11, 12}
    assert set(read_skipped(rolled_back)) == {9, 10, 11, 12}
    at_8, at_12 = checkpoint_of(rolled_back, 8), checkpoint_of(rolled_back, 12)
    assert all(torch.equal(at_8[kind], at_12[kind]) for kind in at_8)
    expected = weights_after(set(range(1, 21)) - set(SUSTAINED), rollback=(8, 12))
    torch.testing.assert_close(checkpoint_of(rolled_back, 20)["weights"], expected, rtol=1e-5, atol=1e-6)


def test_a_rollback_whose_first_steps_are_read_late_changes_nothing(rolled_back, tmp_path):
    run_ranks(train_linear, 2, str(tmp_path), None, SUSTAINED, [*SPIKES, "checkpoint.keep=9"], True)
    check_equal_runs(rolled_back, tmp_path, 20)
    assert (tmp_path / "skipped.jsonl").read_text() == (rolled_back / "skipped.jsonl").read_text()


@pytest.mark.parametrize("stop_after", [9, 11, 12, 13])
def test_a_stop_or_a_kill_around_a_rollback_changes_nothing(stop_after, rolled_back, tmp_path):
    settings = [*SPIKES, "checkpoint.keep=9"]
    run_ranks(train_linear, 2, str(tmp_path), stop_after, SUSTAINED, settings)
    if stop_after == 12:  # as if it was killed after the rollback, before the save
        shutil.rmtree(tmp_path / "checkpoints" / "step-00000012")
    run_ranks(train_linear, 2, str(tmp_path), None, SUSTAINED, settings)
    expected, saved = checkpoint_of(rolled_back, 20), checkpoint_of(tmp_path, 20)
    assert all(torch.equal(saved[kind], expected[kind]) for kind in expected)
    assert read_ledger(tmp_path) == read_ledger(rolled_back)
    assert (tmp_path / "skipped.jsonl").read_text() == (rolled_back / "skipped.jsonl").read_text()


@pytest.mark.parametrize(
    "first, words",
    [(10, "steps 19 to 20: .* rollback 3, optim.spike.max_rollbacks=2; .* optim.lr below 0.05"),
     (6, "steps 6 to 7: .* there is no checkpoint from before them to roll back to; .* optim.lr below 0.05")],
)  # fmt: skip
def test_spikes_that_do_not_end_end_the_run(first, words, tmp_path):
    every = 5 if first == 10 else 50
    more = ["optim.spike.patience=2", "optim.spike.max_rollbacks=2", f"checkpoint.every={every}", "run.steps=30"]
    factors = {step: 1e4 for step in range(first, 31) if step not in (12, 13, 14, 17, 18)}
    (message,) = run_ranks(train_linear, 1, str(tmp_path), None, factors, [*SPIKES, *more])
    assert re.search(f"NonFiniteError: {words}", message), message
