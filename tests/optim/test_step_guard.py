"""Which steps are applied, by hand-computed medians and deviations; NaN and spikes do not change the next verdict."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megasora.config import load
from megasora.optim.step_guard import ABORT, APPLY, NO_CLIPS, NON_FINITE, ROLL_BACK, SKIP, SPIKE, StepGuard, Verdict

NAN, INF = math.nan, math.inf
WINDOW = [1.0, 1.2, 0.9, 1.1, 1.0]  # median 1.0, median absolute deviation 0.1


def guard(*settings, losses=()):
    defaults = ["optim.spike.threshold=10", "optim.spike.window=5", "optim.spike.patience=3"]
    made = StepGuard(load(None, [*defaults, *settings]).optim)
    for step, loss in enumerate(losses, 1):
        assert made.decide(step, loss, 1.0) == Verdict(APPLY)
    return made


def verdicts(made, losses, norm=1.0):
    return [made.decide(step, loss, norm) for step, loss in enumerate(losses, 100)]


@pytest.mark.parametrize("loss, is_spike", [(1 + 10 * 0.1 * 1.48, False), (1 + 10 * 0.1 * 1.49, True), (-50.0, False)])
def test_a_spike_is_so_many_deviations_above_the_median(loss, is_spike):
    (verdict,) = verdicts(guard(losses=WINDOW), [loss])
    assert verdict == (Verdict(SKIP, SPIKE) if is_spike else Verdict(APPLY))


def test_losses_that_are_equal_have_a_deviation_of_a_thousandth():
    assert verdicts(guard(losses=[2.0] * 5), [2.019, 2.021]) == [Verdict(APPLY), Verdict(SKIP, SPIKE)]


@pytest.mark.parametrize("settings, losses", [(["optim.spike.threshold=0"], WINDOW), ([], WINDOW[:4])])
def test_nothing_is_a_spike_if_it_is_off_or_the_window_is_not_full(settings, losses):
    assert verdicts(guard(*settings, losses=losses), [1e9]) == [Verdict(APPLY)]


def test_neither_nan_nor_spikes_nor_steps_without_clips_enter_the_window_or_end_a_series():
    made = guard(losses=WINDOW)
    before = made.state_dict()
    assert verdicts(made, [NAN, INF, None, 100.0, NAN, 100.0]) == [
        Verdict(SKIP, NON_FINITE), Verdict(SKIP, NON_FINITE), Verdict(SKIP, NO_CLIPS), Verdict(SKIP, SPIKE),
        Verdict(SKIP, NON_FINITE), Verdict(SKIP, SPIKE),
    ]  # fmt: skip
    assert made.state_dict()["losses"] == before["losses"]
    assert verdicts(made, [100.0]) == [Verdict(ROLL_BACK, SPIKE)]


@pytest.mark.parametrize("loss, norm", [(NAN, 1.0), (INF, 1.0), (1.0, NAN), (1.0, INF)])
def test_a_series_that_is_not_finite_ends_with_the_first_finite_step(loss, norm):
    made = guard("optim.max_skipped_steps=3")
    skip = Verdict(SKIP, NON_FINITE)
    assert verdicts(made, [loss] * 2, norm) == [skip] * 2
    assert verdicts(made, [1.0]) == [Verdict(APPLY)]
    assert verdicts(made, [loss] * 3, norm) == [skip, skip, Verdict(ABORT, NON_FINITE)]


def test_a_guard_continues_from_its_state_as_json():
    made = guard("optim.max_skipped_steps=4", losses=WINDOW)
    verdicts(made, [100.0, 100.0, NAN])
    made.name_clips([7, 8], 9)
    resumed = guard("optim.max_skipped_steps=4")
    resumed.load_state_dict(json.loads(json.dumps(made.state_dict(), allow_nan=False)))
    rest = [NAN, NAN, NAN]
    assert verdicts(resumed, rest) == verdicts(made, rest)
    assert resumed.state_dict() == made.state_dict()
    verdict = Verdict(ABORT, NON_FINITE)
    assert resumed.describe_abort(verdict, None) == made.describe_abort(verdict, None)
    assert verdicts(resumed, [100.0]) == [Verdict(ROLL_BACK, SPIKE)]


def test_rollbacks_are_counted_over_the_run():
    made = guard("optim.spike.max_rollbacks=1", losses=WINDOW)
    assert verdicts(made, [100.0] * 3)[-1] == Verdict(ROLL_BACK, SPIKE)
    made.rolled_back(WINDOW)
    assert verdicts(made, [1.0, *[100.0] * 3])[-1] == Verdict(ABORT, SPIKE)


@pytest.mark.parametrize(
    "named, num_clips, remedy",
    [([], 9, "optim.lr below"), (list(range(9)), 9, "optim.lr below"), ([3], 9, "leave them out of the dataset")],
)
def test_the_remedy_is_a_lower_lr_unless_only_some_clips_are_not_finite(named, num_clips, remedy):
    made = guard("optim.max_skipped_steps=1")
    (verdict,) = verdicts(made, [NAN])
    made.name_clips(named, num_clips)
    message = made.describe_abort(verdict, Path("runs/a/checkpoints/step-00000004"))
    assert message.startswith("step 100: ") and remedy in message
    assert ("optim.lr" in message) == (remedy == "optim.lr below")


# ---------------------------------------------------------------------- on the device


@pytest.mark.parametrize(
    "settings", [[], ["optim.spike.threshold=0"], ["optim.max_skipped_steps=1"], ["optim.spike.patience=1"]]
)
def test_the_device_decides_as_the_host_and_what_is_more_than_a_skip_is_announced(settings):
    random = np.random.default_rng(7)
    made, seen = guard("optim.max_skipped_steps=4", *settings), set()
    for step in range(1, 400):
        loss = float(random.choice([random.normal(1, 0.1), random.normal(1, 0.1), NAN, INF, 50.0]))
        norm = float(random.choice([1.0, 1.0, 1.0, NAN, INF]))
        scalars = (torch.tensor(x, dtype=torch.float64) for x in (loss, norm))
        applies, can_escalate = bool(made.applies(*scalars)), made.can_escalate
        verdict = made.decide(step, loss, norm)
        seen.add((verdict.action, can_escalate))
        assert applies == (verdict.action == APPLY)
        if verdict.action == ROLL_BACK:
            made.rolled_back(list(made.losses))
        elif verdict.action == ABORT:
            made = guard("optim.max_skipped_steps=4", *settings)
    assert not {(ROLL_BACK, False), (ABORT, False)} & seen and (ABORT, True) in seen
    assert ((APPLY, False) in seen) != any(setting.endswith("=1") for setting in settings)


def test_a_loss_at_the_bound_of_a_spike_is_decided_alike():
    made = guard(losses=WINDOW)
    middle, most = made.spike_bounds()
    for loss in (middle + most, math.nextafter(middle + most, 0), math.nextafter(middle + most, INF)):
        on_device = made.applies(torch.tensor(loss, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
        assert bool(on_device) == (not made.is_spike(loss))
