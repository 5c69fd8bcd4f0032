"""Which checkpoints of a run are kept: the newest, those at fixed intervals, and the best by validation loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping


def to_delete(
    steps: Iterable[int], losses: Mapping[int, float | None], keep: int, keep_every: int = 0, keep_best: int = 0
) -> set[int]:
    """The steps whose checkpoints are deleted: all but those that one of the rules keeps.

    steps       of the checkpoints
    losses      validation loss by step; a step without one, or with one that is not finite, is never among the best
    keep        newest that are kept, at least 1, so that the newest checkpoint is never deleted
    keep_every  multiples of this step are kept; 0: none
    keep_best   steps with the lowest losses that are kept, of equal losses the later ones; 0: none
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: the newest checkpoint is always kept")
    ordered = sorted(set(steps))
    kept = set(ordered[-keep:])
    if keep_every:
        kept.update(step for step in ordered if step % keep_every == 0)
    known = {step: loss for step in ordered if (loss := losses.get(step)) is not None and math.isfinite(loss)}
    kept.update(sorted(known, key=lambda step: (known[step], -step))[:keep_best])
    return set(ordered) - kept
