"""`megasora checkpoint average`: a checkpoint to sample from or to start from, whose weights are a mean of others.

average A B C          of the weights of several checkpoints of one model, equal or with --coefficients
average RUN --sigma S  the power-function average of relative width S at the newest checkpoint, from the averages
                       ema_sigma_* of all checkpoints of a run, see megasora/optim/post_hoc_ema.py
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megasora.checkpoint.imported import save_imported
from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.store import read_state
from megasora.checkpoint.verify import verify_checkpoint
from megasora.checkpoint.weight_kinds import kind_of
from megasora.commands.checkpoint_source import check_same_model, complete, config_of, find, num_bytes
from megasora.commands.run_folder import new_run
from megasora.errors import MegaSoraError
from megasora.formats.recognize import check_format
from megasora.observe.byte_progress import byte_progress
from megasora.optim.ema_decays import SIGMA_PREFIX, sigma_of_kind
from megasora.optim.post_hoc_ema import Combination, Profile, combine_profiles

SUM_TOLERANCE = 1e-6
MIN_SIGMA, MAX_SIGMA = 0.001, 0.25  # as of optim.ema_sigmas
POOR = 0.2  # error of a profile above which the average is hardly the one that was asked for


class Term(NamedTuple):
    """`coefficient` times the values of `kind` of a checkpoint."""

    coefficient: float
    sharded: ShardedCheckpoint
    kind: str


def average_checkpoints(places: list[Path], weights: str, coefficients: list[float] | None, out: Path) -> None:
    """Writes the run folder `out` with the weighted mean of the weights of `places`."""
    if len(places) < 2:
        raise MegaSoraError("average: give at least two checkpoints, or one run and --sigma")
    coefficients = coefficients or [1 / len(places)] * len(places)
    if len(coefficients) != len(places):
        raise MegaSoraError(f"--coefficients has {len(coefficients)} numbers for {len(places)} checkpoints")
    if not all(map(math.isfinite, coefficients)) or abs(sum(coefficients) - 1) > SUM_TOLERANCE:
        raise MegaSoraError(f"--coefficients {' '.join(map(str, coefficients))} must be numbers whose sum is 1")
    folders = [find(place) for place in places]
    terms = []
    for coefficient, folder in zip(coefficients, folders, strict=True):
        sharded = ShardedCheckpoint(folder)
        terms.append(Term(coefficient, sharded, kind_of(sharded, weights)))
    texts = [f"{term.coefficient:.4g} {folder}" for term, folder in zip(terms, folders, strict=True)]
    write_average(terms, folders, f"average of {weights} weights: {', '.join(texts)}", out)
    print(f"average of {len(terms)} checkpoints in {out}")


def average_run(run: Path, sigma: float, out: Path) -> None:
    """Writes the run folder `out` with the power-function average of relative width `sigma` of a run."""
    if not MIN_SIGMA <= sigma <= MAX_SIGMA:
        raise MegaSoraError(f"--sigma {sigma} must be from {MIN_SIGMA} to {MAX_SIGMA}")
    check_format(run, "run")
    folders = whole_checkpoints(run)
    saved = {}
    for folder in folders:
        updates, sharded = read_state(folder).get("ema_updates", 0), ShardedCheckpoint(folder)
        for kind in sorted(sharded.kinds):
            width = sigma_of_kind(kind)
            if width is not None and isinstance(updates, int) and updates > 0:
                saved[Profile(updates, width)] = (sharded, kind)
    if not saved:
        raise MegaSoraError(
            f"no checkpoint of {run} has an average {SIGMA_PREFIX}*; train with optim.ema_sigmas=[0.05,0.1]"
        )
    wanted = Profile(max(profile.update for profile in saved), sigma)
    x, error = combine_profiles(list(saved), wanted)
    terms = [Term(coefficient, *saved[profile]) for coefficient, profile in zip(x, saved, strict=True)]
    write_average(terms, folders, f"post-hoc EMA of {run}, sigma_rel {sigma}, {wanted.update} updates", out)
    print(describe(Combination(x, error), sigma, out))


def describe(combination: Combination, sigma: float, out: Path) -> str:
    """The sentence of the result, with advice if the saved averages are too few."""
    count, error = len(combination.coefficients), combination.error
    text = f"average of relative width {sigma} from {count} saved averages in {out}; error of its profile {error:.1%}"
    if error > POOR:
        text += ": keep more checkpoints (checkpoint.keep_every), or choose a sigma nearer to those of the run"
    return text


def whole_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run whose bytes are all as they were saved; a line for each other one."""
    whole = []
    for folder in complete(run):
        try:
            verify_checkpoint(folder)
            whole.append(folder)
        except MegaSoraError as error:
            print(f"{error}; left out", flush=True)
    if not whole:
        raise MegaSoraError(f"{run} has no whole checkpoint")
    return whole


def write_average(terms: list[Term], folders: list[Path], source: str, out: Path) -> None:
    """Sums in fp64, one tensor of one checkpoint in memory besides the sum."""
    shapes = terms[0].sharded.shapes
    for term in terms[1:]:
        check_same_model((terms[0].sharded.checkpoint, shapes), (term.sharded.checkpoint, term.sharded.shapes))
    config = config_of(folders[-1], read_state(folders[-1]))
    with byte_progress("average", num_bytes(shapes)) as advance, new_run(out, config, folders[-1]) as store:
        save_imported(store, shapes, partial(weighted_sum, terms), source, advance)


@torch.no_grad()
def weighted_sum(terms: list[Term], name: str) -> Tensor:
    """fp32, of the shape of the parameter."""
    total = torch.zeros(terms[0].sharded.shapes[name], dtype=torch.float64)
    for term in terms:
        total.add_(term.sharded.full_tensor(term.kind, name), alpha=term.coefficient)
    return total.float()
