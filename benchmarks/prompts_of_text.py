"""Experiments of `benchmarks.prompts` with captions and images: guidance, solvers, unseen sizes, given images."""

from __future__ import annotations

import dataclasses

import numpy as np

from benchmarks.prompt_bench import Bench, Result, captioned, detect_all, follow, word
from megasora.sampling import timeline as kinds
from megasora.testing.clips import evaluation_prompts
from megasora.testing.detector import detect
from megasora.testing.prompt_figures import Figure, largest_jump, mean, median, psnr, ratio, share

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
UNSEEN_SIZES = ((40, 40), (32, 40), (24, 48), (48, 24))  # height, width; no clip of training has one of these
SOLVERS = {"euler": (4, 8, 20, 40), "heun": (4, 10), "dpmpp_2m": (4, 10, 20), "unipc": (4, 10, 20)}  # steps
WORDS = ("color", "direction", "shape", "background")
Sampled = list[tuple[str, dict[str, str], np.ndarray]]  # caption, its words, video


def prompts_of(bench: Bench) -> list[tuple[str, dict[str, str]]]:
    return evaluation_prompts(max(16, bench.count // 16 * 16))


def sample_captions(bench: Bench, seeds: int, size: tuple[int, int] | None = None, **settings) -> Sampled:
    """The evaluation prompts, each with so many seeds."""
    prompts = prompts_of(bench)
    timelines = [
        bench.sampler.timeline(text, size, seed=seed, sample_id=i)
        for seed in range(seeds)
        for i, (text, _) in enumerate(prompts)
    ]
    videos = bench.sample(timelines, **settings)
    return [(text, words, video) for (text, words), video in zip(prompts * seeds, videos, strict=True)]


def accuracy(name: str, sampled: Sampled, at_least: float | None = None) -> Figure:
    """The share of the clips whose colour and direction are those of the caption."""
    readings = [(detect(video), words) for _, words, video in sampled]
    return share(name, [(r.color, r.direction) == (w["color"], w["direction"]) for r, w in readings], at_least)


def guidance(bench: Bench) -> Result:
    sampled = {scale: sample_captions(bench, 2, guidance_scale=float(scale)) for scale in (0, 1, 4)}
    right = {scale: accuracy(f"guidance {scale}: colour and direction", videos) for scale, videos in sampled.items()}
    gains = [
        Figure(
            f"guidance {high} over {low}",
            right[high].value - right[low].value,
            float(np.hypot(right[high].error, right[low].error)),
            right[high].count,
            target=(">=", 0.1),
        )
        for high, low in ((1, 0), (4, 1))
    ]
    readings = detect_all([video for _, _, video in sampled[4]])
    words = [word(f"guidance 4: {of}", readings, [words[of] for _, words, _ in sampled[4]], of) for of in WORDS]
    return Result([*right.values(), *gains, *words], rows_of(sampled[4]))


def solvers(bench: Bench) -> Result:
    return Result(
        [
            accuracy(f"{solver}, {steps} steps", sample_captions(bench, 1, solver=solver, num_inference_steps=steps))
            for solver, numbers in SOLVERS.items()
            for steps in numbers
        ]
    )


def unseen_size(bench: Bench) -> Result:
    fewer = dataclasses.replace(bench, count=bench.count // 2)
    sampled = [row for size in UNSEEN_SIZES for row in sample_captions(fewer, 1, size)]
    return Result(
        [accuracy("sizes that no training clip has: colour and direction", sampled, 0.75)], rows_of(sampled[::7])
    )


def rows_of(sampled: Sampled, count: int = 16) -> list[tuple[str, np.ndarray]]:
    return [(text, video) for text, _, video in sampled[:count]]


def image(bench: Bench) -> Result:
    """The first frame of a rendered clip, with its caption and with the opposite direction."""
    frames = bench.sampler.config.sample.frames
    clips = bench.clips(frames)
    opposite = [OPPOSITE[c.spec.direction] for c in clips]
    free = [bench.timeline(c, i, frames) for i, c in enumerate(clips)]
    other = [bench.timeline(c, i, frames, direction=d) for i, (c, d) in enumerate(zip(clips, opposite, strict=True))]
    videos, reversed_videos = (
        bench.sample([kinds.keyframes(t, {0: c.frames[0]}) for t, c in zip(timelines, clips, strict=True)])
        for timelines in (free, other)
    )
    kept = [psnr(v[0], bench.round_trip(c.frames[:1])[0]) for v, c in zip(videos, clips, strict=True)]
    readings, reversed_readings = detect_all(videos), detect_all(reversed_videos)
    made = slice(1, frames)
    right, wrong = (
        [c.error(r.positions, made) for r, c in zip(group, clips, strict=True)]
        for group in (readings, reversed_readings)
    )
    pairs = zip(captioned(clips, videos, 8), reversed_videos, strict=False)
    return Result(
        [
            mean("image: first frame against the codec's round trip of the image", kept, "dB", (">=", 30)),
            follow("image: colour and direction", readings, clips, 0.75),
            ratio("image: path error over that of freezing", right, [c.freezing_error(made, 0) for c in clips]),
            word("image, opposite caption: opposite direction", reversed_readings, opposite, "direction", 0.75),
            ratio("image: path error with the opposite caption over that with its own", wrong, right),
        ],
        [row for own, other in pairs for row in (own, ("the opposite direction", other))],
    )


def last_image(bench: Bench) -> Result:
    """The last frame of a rendered clip, with its caption."""
    frames = bench.sampler.config.sample.frames
    clips = bench.clips(frames)
    timelines = [kinds.keyframes(bench.timeline(c, i, frames), {frames - 1: c.frames[-1]}) for i, c in enumerate(clips)]
    videos = bench.sample(timelines)
    readings, made = detect_all(videos), slice(0, frames - 1)
    errors = [c.error(r.positions, made) for r, c in zip(readings, clips, strict=True)]
    frozen = [c.freezing_error(made, frames - 1) for c in clips]
    jumps = [largest_jump(r.positions, c.canvas) for r, c in zip(readings, clips, strict=True)]
    kept = [psnr(v[-1], c.frames[-1]) for v, c in zip(videos, clips, strict=True)]
    return Result(
        [
            mean("last image: last frame against the image", kept, "dB"),
            follow("last image: colour and direction", readings, clips),
            ratio("last image: path error over that of freezing", errors, frozen),
            median("last image: largest jump over the median step", jumps),
        ],
        captioned(clips, videos),
    )
