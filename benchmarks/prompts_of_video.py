"""Experiments of `benchmarks.prompts` with videos: extension, loops, connections, edits, long clips, shots."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from benchmarks.prompt_bench import Bench, Clip, Result, captioned, detect_all, word
from benchmarks.prompts_of_text import accuracy, prompts_of
from megasora.sampling import timeline as kinds
from megasora.testing.clips import DEFAULT_COLORS, DIRECTIONS, SIZES, SPEEDS, describe
from megasora.testing.detector import Reading, detect
from megasora.testing.prompt_figures import (
    Figure,
    largest_jump,
    mean,
    median,
    path_correlation,
    psnr,
    ratio,
    share,
    step_lengths,
    torus_offset,
)

GIVEN, NEW = 9, 8  # frames of an extension
STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of edits
LONGER = 4  # lengths of a clip of the settings, or of the longest one of training


# ---------------------------------------------------------------- extension


def extend(bench: Bench) -> Result:
    return continuation(bench, "extend", GIVEN, NEW, is_backward=False)


def prepend(bench: Bench) -> Result:
    return continuation(bench, "prepend", GIVEN, NEW, is_backward=True)


def continuation(bench: Bench, name: str, given: int, new: int, is_backward: bool, **settings) -> Result:
    """`new` frames after `given` ones of a rendered clip, or before them, against the true motion."""
    clips = bench.clips(given + new)
    sample = bench.settings_with(**settings)
    made, nearest = (slice(0, new), new) if is_backward else (slice(given, given + new), given - 1)
    timelines = []
    for i, clip in enumerate(clips):
        free = bench.timeline(clip, i, new)
        if is_backward:
            timelines.append(kinds.prepend(free, bench.sampler.context_after(clip.frames[new:], sample)))
        else:
            timelines.append(kinds.extend(free, bench.sampler.context_before(clip.frames[:given], sample)))
    videos = []
    for clip, video in zip(clips, bench.sample(timelines, **settings), strict=True):
        whole = clip.frames.copy()
        whole[made] = video[:new] if is_backward else video[-new:]
        videos.append(whole)
    readings, readings_of_new = detect_all(videos), detect_all([video[made] for video in videos])
    errors = [c.error(r.positions, made) for r, c in zip(readings, clips, strict=True)]
    frozen = [c.freezing_error(made, nearest) for c in clips]
    return Result(
        [
            mean(f"{name}: error of the path", errors, "px"),
            ratio(f"{name}: error over that of freezing the nearest frame", errors, frozen, ("<=", 0.25)),
            word(f"{name}: colour kept", readings_of_new, [c.spec.color for c in clips], "color", 0.9),
            word(f"{name}: direction kept", readings_of_new, [c.spec.direction for c in clips], "direction", 0.9),
            median(f"{name}: largest jump over the median step", jumps(readings, clips)),
        ],
        captioned(clips, videos),
    )


def jumps(readings: Sequence[Reading], clips: Sequence[Clip]) -> list[float]:
    return [largest_jump(r.positions, c.canvas) for r, c in zip(readings, clips, strict=True)]


def long(bench: Bench) -> Result:
    """Clips of 4 times `sample.frames`, in windows of that length, and of 4 times the longest clip of training."""
    window, ft = bench.sampler.config.sample.frames, bench.sampler.coder.ft
    total, in_windows = LONGER * window, {"window_frames": window, "context_frames": 1 + ft}
    extended = continuation(bench, f"extend to {total} frames", window, total - window, False, **in_windows)
    figures, rows = [dataclasses.replace(f, target=None) for f in extended.figures], extended.rows[:6]
    lengths = [(total, in_windows, bench.count)]
    if bench.sampler.trained_on.frames:
        lengths.append((LONGER * bench.sampler.trained_on.frames, {}, 16))
    for frames, settings, count in lengths:
        prompts = prompts_of(bench)[:count]
        timelines = [bench.sampler.timeline(text, frames=frames, sample_id=i) for i, (text, _) in enumerate(prompts)]
        videos = bench.sample(timelines, **settings)
        ends = [(text, words, video[-window:]) for (text, words), video in zip(prompts, videos, strict=True)]
        name = f"{frames} frames from text: colour and direction of the last {window}"
        figures.append(accuracy(name, ends, 0.75))
        rows += [(f"{frames} frames: {text}", video) for (text, _), video in zip(prompts[:6], videos, strict=False)]
    return Result(figures, rows)


# ---------------------------------------------------------------- between given frames


def connect(bench: Bench) -> Result:
    """Two parts of a rendered clip, of one latent frame more than one and of one, with one or two between."""
    figures, rows = [], []
    ft = bench.sampler.coder.ft
    before, after = 1 + ft, ft
    for gap in (ft, 2 * ft):
        clips = bench.clips(before + gap + after)
        timelines = [
            kinds.connect(bench.timeline(c, i, gap), c.frames[:before], c.frames[before + gap :])
            for i, c in enumerate(clips)
        ]
        videos, made = bench.sample(timelines), slice(before, before + gap)
        readings = detect_all(videos)
        is_given = np.ones(before + gap + after, bool)
        is_given[made] = False
        kept = [np.array_equal(v[is_given], c.frames[is_given]) for v, c in zip(videos, clips, strict=True)]
        errors = [c.error(r.positions, made) for r, c in zip(readings, clips, strict=True)]
        nearest = np.where(np.arange(gap) < gap / 2, before - 1, before + gap)
        frozen = [c.freezing_error(made, nearest) for c in clips]
        name, found = f"connect over {gap} frames", jumps(readings, clips)
        figures += [
            share(f"{name}: both ends kept", kept, 1.0),
            median(f"{name}: largest jump over the median step", found, target=("<=", 3)),
            share(f"{name}: clips without a jump above 3 times the median", [jump <= 3 for jump in found]),
            ratio(f"{name}: error over that of freezing the nearest frame", errors, frozen),
        ]
        rows += captioned(clips, videos, 6)
    return Result(figures, rows)


def loop(bench: Bench) -> Result:
    """Slow shapes on a canvas of 24 px, whose motion closes after 12 frames, of which 5 are given."""
    given, side = 1 + bench.sampler.coder.ft, 24
    new = side // SPEEDS["slow"] - given
    every = bench.clips(given, 4 * bench.count, native_sizes={(side, side): 1.0})
    clips = [c for c in every if c.spec.speed == "slow"][: bench.count]
    timelines = [
        kinds.connect(
            bench.timeline(c, i, new), c.frames, bench.sampler.context_after(c.frames, bench.settings_with(), new)
        )
        for i, c in enumerate(clips)
    ]
    videos = [
        np.concatenate([c.frames, v[given : given + new]]) for c, v in zip(clips, bench.sample(timelines), strict=True)
    ]
    readings, closing = detect_all(videos), []
    for reading, clip in zip(readings, clips, strict=True):
        step = np.linalg.norm(torus_offset(reading.positions[:1], reading.positions[-1:], clip.canvas))
        typical = np.median(step_lengths(reading.positions, clip.canvas))
        closing.append(float(step / typical) if np.isfinite(step) and typical > 0 else np.inf)
    return Result(
        [
            median("loop: step from the last frame to the first over the median step", closing, target=("<=", 1.5)),
            share("loop: clips with a closing step of at most 1.5 times the median", [r <= 1.5 for r in closing]),
            median("loop: largest jump over the median step", jumps(readings, clips)),
        ],
        [(text, np.concatenate([v, v[:3]])) for text, v in captioned(clips, videos)],
    )


# ---------------------------------------------------------------- edits


def edit(bench: Bench) -> Result:
    """Another colour in the caption, by strength; the path should stay."""
    clips, wanted, timelines = to_recolour(bench)
    figures, rows = [], captioned(clips, [c.frames for c in clips], 3)
    for strength in STRENGTHS:
        videos = bench.sample([kinds.edit(t, c.frames, strength) for t, c in zip(timelines, clips, strict=True)])
        figures += recoloured(f"edit {strength:g}", detect_all(videos), clips, wanted)
        rows += [(f"{strength:g}: {w}", v) for w, v in zip(wanted[:3], videos, strict=False)]
    return Result(figures, rows)


def masked_edit(bench: Bench) -> Result:
    """The same in a mask around the shape; pixels outside of it must not change."""
    clips, wanted, timelines = to_recolour(bench)
    masks, strength = [mask_around(c) for c in clips], STRENGTHS[-2]
    videos = bench.sample(
        [kinds.edit(t, c.frames, strength, m) for t, c, m in zip(timelines, clips, masks, strict=True)]
    )
    outside = [psnr(v[~m], c.frames[~m]) for v, m, c in zip(videos, masks, clips, strict=True)]
    name = f"edit {strength:g} in a mask"
    figures = recoloured(name, detect_all(videos), clips, wanted)
    return Result([*figures, mean(f"{name}: pixels outside", outside, "dB")], captioned(clips, videos))


def to_recolour(bench: Bench) -> tuple[list[Clip], list[str], list[kinds.Timeline]]:
    """Rendered clips, another colour for each, and timelines whose captions have it."""
    frames = bench.sampler.config.sample.frames
    clips = bench.clips(frames)
    wanted = [DEFAULT_COLORS[(DEFAULT_COLORS.index(c.spec.color) + 1 + i % 3) % 4] for i, c in enumerate(clips)]
    return (
        clips,
        wanted,
        [bench.timeline(c, i, frames, color=w) for i, (c, w) in enumerate(zip(clips, wanted, strict=True))],
    )


def recoloured(name: str, readings: list[Reading], clips: list[Clip], wanted: list[str]) -> list[Figure]:
    sources = [detect(c.frames).positions for c in clips]
    same = [path_correlation(r.positions, s, c.canvas) for r, s, c in zip(readings, sources, clips, strict=True)]
    moved = [c.error(r.positions) for r, c in zip(readings, clips, strict=True)]
    return [
        word(f"{name}: colour as asked", readings, wanted, "color"),
        mean(f"{name}: correlation with the path of the source", same),
        median(f"{name}: distance from the path of the source", moved, "px"),
    ]


def mask_around(clip: Clip) -> np.ndarray:
    """bool [F, H, W]: a square around the true place of the shape in each frame, 4 px wider than it on each side."""
    reach = SIZES[clip.spec.size] / 2 + 4

    def near(length: int, centre_F: np.ndarray) -> np.ndarray:  # [F, length]
        offset = np.arange(length)[None, :] + 0.5 - centre_F[:, None]
        return np.abs((offset + length / 2) % length - length / 2) <= reach

    return near(clip.spec.height, clip.path[:, 1])[:, :, None] & near(clip.spec.width, clip.path[:, 0])[:, None, :]


# ---------------------------------------------------------------- several shots


def shots(bench: Bench) -> Result:
    """Three shots, each the continuation of the one before in another direction, with or without the colour named."""
    frames, context = bench.sampler.config.sample.frames, 1 + bench.sampler.coder.ft
    clips = bench.clips(frames)
    first = bench.sample([bench.timeline(c, i, frames) for i, c in enumerate(clips)])
    figures, rows = [], []
    for kind, names_color, at_least in (
        ("three shots", True, 0.9),
        ("three shots, later ones without colour", False, None),
    ):
        films, is_turned = [[video] for video in first], []
        for number in (1, 2):
            directions = [DIRECTIONS[(DIRECTIONS.index(c.spec.direction) + number) % 4] for c in clips]
            timelines = []
            for i, (c, film, direction) in enumerate(zip(clips, films, directions, strict=True)):
                text = describe(c.spec.color, c.spec.shape, direction, background=c.spec.background)
                text = text if names_color else text.replace(f"{c.spec.color} ", "")
                free = dataclasses.replace(bench.timeline(c, i, NEW), prompt=text, seed=number)
                timelines.append(kinds.extend(free, film[-1][-context:]))
            for film, video in zip(films, bench.sample(timelines), strict=True):
                film.append(video[-NEW:])
            readings = detect_all([film[-1] for film in films])
            is_turned += [r.direction == d for r, d in zip(readings, directions, strict=True)]
        colors = [[reading.color for reading in detect_all(film)] for film in films]
        figures += [
            share(f"{kind}: one colour in all", [len(set(c)) == 1 and None not in c for c in colors], at_least),
            share(f"{kind}: direction as the caption of the shot", is_turned),
        ]
        rows += [(f"{kind}: {c.spec.color}", np.concatenate(f)) for c, f in zip(clips[:6], films, strict=False)]
    return Result(figures, rows)
