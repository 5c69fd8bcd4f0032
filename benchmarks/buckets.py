"""The same clips in packs and in buckets: useful tokens per FLOP, and per second, of training.

Bucketing puts clips of similar size and length into one batch, so that a batch is a rectangle:

    pad     a clip is padded to the next larger bucket: nothing is lost, padding is computed in vain
    crop    a clip is cropped to the next smaller bucket: nothing is padded, what is cropped is never seen

The comparison favours buckets: they are finer than usual (sides of every 8 tokens, latent frames of every power of
two), a clip whose bucket is larger than a pack has a bucket of its own size, and batches that do not fill are left out.
A batch has as many clips of a bucket as fit into the tokens of a pack. Useful tokens are those of clips: with `pad`
all, with `crop` the remaining ones.

Each rank takes a batch or a pack per step, and a step lasts as long as its most expensive one: useful tokens / (ranks *
max), summed over steps. One rank is also the result for buckets on many ranks if all of them use the same bucket in a
step. FLOPs are counted by `model/flops.py`; padding of a pack is counted as if it were more of the same clips. Seconds
are CPU time of forward and backward of a small model, on one thread; the variants are measured alternately, with
batches from the cheapest to the most expensive.
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

SIDE = 8  # tokens: the sides of buckets are multiples
CAPTION_TOKENS = 8
PACKS, PAD, CROP = "packs", "pad", "crop"


@dataclass(frozen=True)
class Batch:
    """A batch of a bucket, or a pack."""

    grids_G3: np.ndarray  # (t, h, w) in tokens of each segment, as computed
    useful: int  # tokens of clips
    computed: int  # tokens, with the padding of a pack


def bucket_of(grids_I3: np.ndarray, tokens_per_pack: int, up: bool) -> np.ndarray:
    """int64 [I, 3]: the bucket of each clip, at most `tokens_per_pack` tokens. Sides below SIDE are rounded up."""
    power = np.log2(grids_I3[:, :1])
    frames = 2 ** (np.ceil(power) if up else np.floor(power)).astype(np.int64)
    sides = -(-grids_I3[:, 1:] // SIDE) if up else np.maximum(grids_I3[:, 1:] // SIDE, 1)
    bucket_I3 = np.concatenate([frames, sides * SIDE], axis=1)
    return np.where(bucket_I3.prod(1, keepdims=True) <= tokens_per_pack, bucket_I3, grids_I3)


def bucket_batches(grids_I3: np.ndarray, tokens_per_pack: int, up: bool, seed: int) -> list[Batch]:
    """All full batches, in random order."""
    rng = np.random.default_rng(seed)
    bucket_I3 = bucket_of(grids_I3, tokens_per_pack, up)
    useful_I = np.minimum(grids_I3, bucket_I3).prod(1)
    buckets_K3, bucket_I = np.unique(bucket_I3, axis=0, return_inverse=True)
    batches = []
    for b, bucket in enumerate(buckets_K3):
        clips = rng.permutation(np.flatnonzero(bucket_I.ravel() == b))
        size = tokens_per_pack // int(bucket.prod())
        grids = np.broadcast_to(bucket, (size, 3))
        for first in range(0, len(clips) - size + 1, size):
            chosen = clips[first : first + size]
            batches.append(Batch(grids, int(useful_I[chosen].sum()), int(grids.prod(1).sum())))
    return [batches[i] for i in rng.permutation(len(batches))]


def packed_steps(grids_I3: np.ndarray, config: Config, break_even: int, ranks: int) -> list[list[Batch]]:
    """The steps of an epoch, with one pack per rank."""
    tokens, tokens_per_pack = grids_I3.prod(1), config.data.tokens_per_pack
    plan = PackingPlan([tokens], [1.0], tokens_per_pack, ranks, config.data.packing_window, break_even, config.run.seed)
    steps = []
    for step in plan.steps(Cursor()):
        if step.next_cursor.epoch:
            return steps
        steps.append([Batch(grids_I3[p.clips], int(p.tokens.sum()), tokens_per_pack) for p in step.packs])
    raise AssertionError("a plan has no end")


def steps_of(variant: str, grids_I3: np.ndarray, config: Config, break_even: int, ranks: int) -> list[list[Batch]]:
    """The whole steps of an epoch of one variant, with one batch per rank."""
    if variant == PACKS:
        return packed_steps(grids_I3, config, break_even, ranks)
    batches = bucket_batches(grids_I3, config.data.tokens_per_pack, variant == PAD, config.run.seed)
    return [batches[i : i + ranks] for i in range(0, len(batches) - ranks + 1, ranks)]


# ---- per FLOP


def flops_of(batch: Batch, config: Config) -> float:
    """FLOPs of forward and backward."""
    lengths = batch.grids_G3.prod(1)
    cu = torch.from_numpy(np.append(0, np.cumsum(lengths)))
    text = CAPTION_TOKENS * torch.arange(len(lengths) + 1)
    return pack_flops(config.model, patch_dim(config), cu, text) * batch.computed / int(lengths.sum())


@dataclass(frozen=True)
class Arithmetic:
    """Useful tokens per FLOP of one variant."""

    variant: str
    ranks: int
    steps: int
    tokens_per_gflop: float  # useful, including the time that ranks wait for the most expensive one
    packs_over_this: float
    useful_fraction: float  # of the computed tokens
    seen_fraction: float  # of the tokens of all clips, those that are trained on
    max_over_mean: float  # FLOPs of the ranks of a step, mean over steps


def count_arithmetic(config: Config, break_even: int, clips: int, ranks: int) -> list[Arithmetic]:
    tokens_per_pack = config.data.tokens_per_pack
    grids = heavy_grids(tokens_per_pack, clips, config.run.seed)
    down = bucket_of(grids, tokens_per_pack, up=False)
    seen = {PACKS: 1.0, PAD: 1.0, CROP: float(np.minimum(grids, down).prod(1).sum() / grids.prod(1).sum())}
    measured = {}
    for variant in (PACKS, PAD, CROP):
        steps = steps_of(variant, grids, config, break_even, ranks)
        costs_SR = np.array([[flops_of(batch, config) for batch in step] for step in steps])
        useful = sum(batch.useful for step in steps for batch in step)
        computed = sum(batch.computed for step in steps for batch in step)
        speed = useful / (ranks * costs_SR.max(1).sum() / 1e9)
        measured[variant] = (
            float(speed),
            len(steps),
            useful / computed,
            float((costs_SR.max(1) / costs_SR.mean(1)).mean()),
        )
    return [
        Arithmetic(variant, ranks, count, speed, measured[PACKS][0] / speed, density, seen[variant], ratio)
        for variant, (speed, count, density, ratio) in measured.items()
    ]


# ---- per second


def build_pack(batch: Batch, config: Config, generator: torch.Generator) -> VideoBatch:
    """A pack of random clips with the sizes of `batch`."""
    records = []
    for i, (t, h, w) in enumerate(batch.grids_G3.tolist()):
        patches_LP = torch.randn(t * h * w, patch_dim(config), generator=generator)
        words = torch.randint(0, 257, (CAPTION_TOKENS, 16), generator=generator)
        records.append(Record(i, patches_LP, (t, h, w), words, (16.0 * h, 16.0 * w, 4.0 * t, 8.0), "a caption"))
    return make_batch(records, batch.computed)


@dataclass(frozen=True)
class Seconds:
    """Useful tokens per second of one variant; lists have one number per trial."""

    variant: str
    tokens_per_second: list[float]  # useful, per CPU second
    packs_over_this: list[float]


def measure_seconds(config: Config, break_even: int, clips: int, steps: int, trials: int) -> list[Seconds]:
    """One process, one pack or batch per step; the first step of each variant is not counted."""
    grids = heavy_grids(config.data.tokens_per_pack, clips, config.run.seed)
    model = build_model(config, patch_dim(config))
    model.initialise(0)
    objective, generator = FlowMatching(config.objective, config.run.seed), torch.Generator().manual_seed(0)
    batches = {
        variant: [s[0] for s in steps_of(variant, grids, config, break_even, 1)] for variant in (PACKS, PAD, CROP)
    }
    for of_variant in batches.values():
        of_variant.sort(key=lambda batch: flops_of(batch, config))
    speeds: dict[str, list[float]] = {variant: [] for variant in batches}
    for trial in range(trials):
        spent, useful = dict.fromkeys(batches, 0.0), dict.fromkeys(batches, 0)
        for step in range(-(trial == 0), steps):
            for variant, of_variant in batches.items():
                batch = of_variant[int((max(step, 0) + (trial + 0.5) / trials) / steps * len(of_variant))]
                noised, target, weight = objective.add_noise(build_pack(batch, config, generator), max(step, 0))
                model.zero_grad()
                start = time.process_time()
                error = velocity_error(model(noised), target, weight)
                (error.squared_error_sum / max(1, error.tokens)).backward()
                if step >= 0:
                    spent[variant] += time.process_time() - start
                    useful[variant] += batch.useful
        for variant in batches:
            speeds[variant].append(useful[variant] / spent[variant])
    return [
        Seconds(variant, speed, [a / b for a, b in zip(speeds[PACKS], speed, strict=True)])
        for variant, speed in speeds.items()
    ]
