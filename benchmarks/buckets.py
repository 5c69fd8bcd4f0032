"""The same clips in packs and in buckets: useful tokens for the arithmetic, and for the seconds, of training.

Bucketing puts clips of about one size and length into one batch, so that a batch is a rectangle:

    pad     a clip goes up to the next bucket: nothing is lost, what is filled up is computed for nothing
    crop    a clip goes down to the bucket below: nothing is filled up, what is cut off is never seen

Buckets here are kind: finer than is usual (sides of every 8 tokens, latent frames of every power of two), a clip whose
bucket is more than a pack is a bucket of its own size, and batches that do not get full are left out. A batch has as
many clips of a bucket as the token budget of a pack holds. Useful are tokens of clips: with `pad` all of them, with
`crop` those that are kept.

A step takes a batch or a pack a rank and lasts as long as the dearest: useful / (ranks * dearest), summed over steps.
One rank is also what buckets come to on many, where all of them take the same bucket in a step. Arithmetic is counted
by `model/flops.py`; of a pack, padding is counted as if it were more of the same clips. Seconds are CPU time of forward
and backward of a small model, on one thread; the ways take turns, with batches from the cheapest to the dearest.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from megasora.batch import VideoBatch
from megasora.build import build_model, patch_dim
from megasora.config import Config
from megasora.data.pack import Record, make_batch
from megasora.data.packing_plan import Cursor, PackingPlan
from megasora.diffusion.flow import FlowMatching, velocity_error
from megasora.model.flops import pack_flops
from megasora.testing.mixes import heavy_grids

SIDE = 8  # tokens between two buckets
WORDS = 8  # of a caption
PACKS, PAD, CROP = "packs", "pad", "crop"


@dataclass(frozen=True)
class Batch:
    grids_G3: np.ndarray  # of its segments as they are computed: (t, h, w) in tokens
    useful: int  # tokens of clips in it
    slots: int  # tokens that are computed, padding of a pack included


def bucket_of(grids_N3: np.ndarray, budget: int, up: bool) -> np.ndarray:
    """int64 [N, 3]: each clip's bucket, of at most `budget` tokens. A side of less than SIDE tokens goes up."""
    power = np.log2(grids_N3[:, :1])
    frames = 2 ** (np.ceil(power) if up else np.floor(power)).astype(np.int64)
    sides = -(-grids_N3[:, 1:] // SIDE) if up else np.maximum(grids_N3[:, 1:] // SIDE, 1)
    bucket_N3 = np.concatenate([frames, sides * SIDE], axis=1)
    return np.where(bucket_N3.prod(1, keepdims=True) <= budget, bucket_N3, grids_N3)


def bucket_batches(grids_N3: np.ndarray, budget: int, up: bool, seed: int) -> list[Batch]:
    """Every full batch of clips, in the order in which they are trained on: drawn."""
    rng = np.random.default_rng(seed)
    bucket_N3 = bucket_of(grids_N3, budget, up)
    kept_N = np.minimum(grids_N3, bucket_N3).prod(1)
    buckets_B3, bucket_of_N = np.unique(bucket_N3, axis=0, return_inverse=True)
    batches = []
    for b, bucket in enumerate(buckets_B3):
        clips = rng.permutation(np.flatnonzero(bucket_of_N.ravel() == b))
        size = budget // int(bucket.prod())
        grids = np.broadcast_to(bucket, (size, 3))
        for first in range(0, len(clips) - size + 1, size):
            chosen = clips[first : first + size]
            batches.append(Batch(grids, int(kept_N[chosen].sum()), int(grids.prod(1).sum())))
    return [batches[i] for i in rng.permutation(len(batches))]


def packed(grids_N3: np.ndarray, config: Config, attention_break_even_tokens: int, ranks: int) -> list[list[Batch]]:
    """Steps of an epoch, a pack a rank."""
    tokens, budget = grids_N3.prod(1), config.data.tokens_per_pack
    plan = PackingPlan([tokens], [1.0], budget, ranks, config.data.packing_window, attention_break_even_tokens, config.run.seed)
    steps = []
    for step in plan.steps(Cursor()):
        if step.next_cursor.epoch:
            return steps
        steps.append([Batch(grids_N3[p.clips], int(p.tokens.sum()), budget) for p in step.packs])
    raise AssertionError("a plan is endless")


def steps_of(way: str, grids_N3: np.ndarray, config: Config, attention_break_even_tokens: int, ranks: int) -> list[list[Batch]]:
    """Whole steps of an epoch in one of the ways."""
    if way == PACKS:
        return packed(grids_N3, config, attention_break_even_tokens, ranks)
    batches = bucket_batches(grids_N3, config.data.tokens_per_pack, way == PAD, config.run.seed)
    return [batches[i : i + ranks] for i in range(0, len(batches) - ranks + 1, ranks)]


# ---- by arithmetic


def flops_of(batch: Batch, config: Config) -> float:
    """Forward and backward."""
    lengths = batch.grids_G3.prod(1)
    cu = torch.from_numpy(np.append(0, np.cumsum(lengths)))
    text = WORDS * torch.arange(len(lengths) + 1)
    return pack_flops(config.model, patch_dim(config), cu, text) * batch.slots / int(lengths.sum())


@dataclass(frozen=True)
class Arithmetic:
    way: str
    ranks: int
    steps: int
    tokens_per_gflop: float  # useful, with the waiting of ranks for the dearest
    packs_over_this: float
    useful_of_computed: float  # tokens
    kept_of_clips: float  # tokens of clips that are trained on, of those that are there
    dearest_over_mean: float  # FLOPs of a step's ranks, mean over steps


def count_arithmetic(config: Config, attention_break_even_tokens: int, clips: int, ranks: int) -> list[Arithmetic]:
    budget = config.data.tokens_per_pack
    grids = heavy_grids(budget, clips, config.run.seed)
    down = bucket_of(grids, budget, up=False)
    kept = {PACKS: 1.0, PAD: 1.0, CROP: float(np.minimum(grids, down).prod(1).sum() / grids.prod(1).sum())}
    found = {}
    for way in (PACKS, PAD, CROP):
        steps = steps_of(way, grids, config, attention_break_even_tokens, ranks)
        costs_SR = np.array([[flops_of(batch, config) for batch in step] for step in steps])
        useful = sum(batch.useful for step in steps for batch in step)
        slots = sum(batch.slots for step in steps for batch in step)
        speed = useful / (ranks * costs_SR.max(1).sum() / 1e9)
        found[way] = float(speed), len(steps), useful / slots, float((costs_SR.max(1) / costs_SR.mean(1)).mean())
    return [
        Arithmetic(way, ranks, count, speed, found[PACKS][0] / speed, density, kept[way], dearest)
        for way, (speed, count, density, dearest) in found.items()
    ]


# ---- by seconds


def make_clips(batch: Batch, config: Config, draw: torch.Generator) -> VideoBatch:
    records = []
    for number, (t, h, w) in enumerate(batch.grids_G3.tolist()):
        patches_LP = torch.randn(t * h * w, patch_dim(config), generator=draw)
        words = torch.randint(0, 257, (WORDS, 16), generator=draw)
        records.append(Record(number, patches_LP, (t, h, w), words, (16.0 * h, 16.0 * w, 4.0 * t, 8.0), "a caption"))
    return make_batch(records, batch.slots)


@dataclass(frozen=True)
class Seconds:
    way: str
    tokens_per_second: list[float]  # useful, of CPU time, of each turn
    packs_over_this: list[float]


def measure_seconds(config: Config, attention_break_even_tokens: int, clips: int, steps: int, turns: int) -> list[Seconds]:
    """One process, a pack or batch a step; the first step of each way is not counted."""
    grids = heavy_grids(config.data.tokens_per_pack, clips, config.run.seed)
    model = build_model(config, patch_dim(config))
    model.initialise(0)
    objective, draw = FlowMatching(config.objective, config.run.seed), torch.Generator().manual_seed(0)
    batches = {way: [s[0] for s in steps_of(way, grids, config, attention_break_even_tokens, 1)] for way in (PACKS, PAD, CROP)}
    for all_of in batches.values():
        all_of.sort(key=lambda batch: flops_of(batch, config))
    speeds: dict[str, list[float]] = {way: [] for way in batches}
    for turn in range(turns):
        spent, useful = dict.fromkeys(batches, 0.0), dict.fromkeys(batches, 0)
        for step in range(-(turn == 0), steps):
            for way, all_of in batches.items():
                batch = all_of[int((max(step, 0) + (turn + 0.5) / turns) / steps * len(all_of))]
                noised, target, weight = objective.add_noise(make_clips(batch, config, draw), max(step, 0))
                model.zero_grad()
                start = time.process_time()
                error = velocity_error(model(noised), target, weight)
                (error.squared_error_sum / max(1, error.tokens)).backward()
                if step >= 0:
                    spent[way] += time.process_time() - start
                    useful[way] += batch.useful
        for way in batches:
            speeds[way].append(useful[way] / spent[way])
    return [
        Seconds(way, speed, [a / b for a, b in zip(speeds[PACKS], speed, strict=True)]) for way, speed in speeds.items()
    ]
