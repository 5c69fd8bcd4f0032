"""Which checkpoints are deleted: known answers, and properties of random runs."""

from __future__ import annotations

import math
import random

import pytest

from megasora.checkpoint.retention import to_delete

STEPS = range(100, 1100, 100)


@pytest.mark.parametrize(
    "rules, kept",
    [
        ((1, 0, 0), [1000]),
        ((3, 0, 0), [800, 900, 1000]),
        ((1, 500, 0), [500, 1000]),
        ((2, 300, 0), [300, 600, 900, 1000]),
        ((1, 0, 2), [300, 700, 1000]),
        ((2, 400, 1), [400, 700, 800, 900, 1000]),
        ((99, 0, 0), list(STEPS)),
    ],
)
def test_known_answers(rules, kept):
    losses = dict.fromkeys(STEPS, 0.5) | {300: 0.2, 700: 0.1, 900: math.nan, 400: None}
    assert sorted(set(STEPS) - to_delete(STEPS, losses, *rules)) == kept


def test_of_equal_losses_the_later_checkpoint_is_kept():
    assert to_delete([1, 2, 3, 4], {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.9}, 1, 0, 1) == {1, 2}


def test_losses_that_are_not_finite_are_never_the_best():
    assert to_delete([1, 2, 3], {1: -math.inf, 2: math.nan, 3: None}, 1, 0, 2) == {1, 2}


def test_the_newest_cannot_be_given_up():
    with pytest.raises(ValueError, match="keep=0"):
        to_delete([1], {}, 0)


@pytest.mark.parametrize("seed", range(200))
def test_properties(seed):
    rng = random.Random(seed)
    steps = rng.sample(range(1, 200), rng.randint(0, 30))
    losses = {step: rng.choice([None, math.nan, math.inf, 0.1, 0.2, rng.random()]) for step in steps}
    keep, keep_every, keep_best = rng.randint(1, 5), rng.choice([0, 1, 7, 50]), rng.randint(0, 4)
    deleted = to_delete(steps, losses, keep, keep_every, keep_best)
    kept = set(steps) - deleted
    assert deleted <= set(steps)
    assert set(sorted(steps)[-keep:]) <= kept  # the newest
    assert not keep_every or {step for step in steps if step % keep_every == 0} <= kept
    finite = sorted(losses[s] for s in steps if losses[s] is not None and math.isfinite(losses[s]))
    best = finite[:keep_best]
    kept_losses = [losses[s] for s in kept if losses[s] is not None]
    assert all(kept_losses.count(loss) >= best.count(loss) for loss in best)
    every = sum(keep_every > 0 and step % keep_every == 0 for step in steps)
    assert len(kept) <= min(keep, len(steps)) + every + len(best)  # and nothing without a reason
    assert not to_delete(kept, losses, keep, keep_every, keep_best)  # deleting twice deletes nothing more
    more = to_delete([*steps, 500], losses, keep, keep_every, keep_best)
    assert deleted <= more  # what was deleted once would not have been kept later


def test_deleting_after_every_save_is_deleting_at_the_end():
    losses = {step: 1 + math.sin(step) for step in STEPS}
    present: set[int] = set()
    for step in STEPS:
        present.add(step)
        present -= to_delete(present, losses, 2, 400, 2)
    assert present == set(STEPS) - to_delete(STEPS, losses, 2, 400, 2)
