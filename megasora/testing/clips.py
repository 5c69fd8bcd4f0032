"""Procedural captioned clips: a world small enough to learn on a CPU, and the detector that grades it.

In: a seed. Out: `ClipSpec` -> uint8 frames [F, H, W, 3] and a caption, files of them (H.264 mp4 or PNG,
with NAME.txt beside), and the way back, `detect(frames)` -> what is seen and where it is.

Why this world: one coloured shape moves over a grey background, so each word of the caption can be read
back from pixels by arithmetic, and "does the model follow the text" becomes a number. The canvas is a torus
(motion `wrap`): without wrap-around the start position would give the direction away, and a model could
ignore the words. Backgrounds are grey and shapes saturated: chroma alone holds the coverage of the shape.

Coordinates are pixels, x to the right and y down, pixel (0, 0) covering [0, 1) x [0, 1). Scale is absolute:
a small shape measures 10 px on every canvas.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from megasora.data.video import write_image, write_video
from megasora.errors import MegaSoraError

COLORS = {  # name -> RGB; one saturation for all, at least 60 degrees of hue apart
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (235, 215, 40),
    "magenta": (215, 50, 205),
    "cyan": (40, 205, 215),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("left", "right", "up", "down")
BACKGROUNDS = ("plain", "striped", "checkered")
SIZES = {"small": 10, "large": 14}  # diameter, side, or height of the triangle, px
SPEEDS = {"slow": 2, "fast": 3}  # px per frame; at 1 px per frame small models do not learn motion
MOTIONS = ("wrap", "bounce")
SPLITS = ("train", "val")

DEFAULT_COLORS = ("red", "green", "blue", "yellow")
DEFAULT_SHAPES = ("circle", "square")
DEFAULT_BACKGROUNDS = ("plain", "striped")

# (color, shape, direction) never drawn for training: each color once, each direction once, each shape twice.
HELD_OUT = frozenset(
    {
        ("red", "square", "right"),
        ("green", "square", "up"),
        ("blue", "circle", "left"),
        ("yellow", "circle", "down"),
    }
)

NATIVE_SIZES = {  # (height, width) px -> weight
    (24, 24): 0.40,
    (24, 32): 0.19,
    (32, 24): 0.19,
    (32, 32): 0.10,
    (24, 40): 0.05,
    (40, 24): 0.05,
    (32, 48): 0.01,
    (48, 32): 0.01,
}
LENGTHS = {1: 0.12, 5: 0.30, 9: 0.45, 13: 0.06, 17: 0.04, 33: 0.03}  # frames -> weight
FRAME_RATES = (8, 12, 16, 24)  # frames per second

TEXTURE_PERIOD = 8  # px; divides every canvas, so textures close on the torus
TEXTURE_CONTRAST = 26  # grey levels either side of the brightness
# Texture edges fall on multiples of 4 px: each 8 px block then holds one step, which low frequencies carry.
TEXTURE_PHASES = (0, 4)  # px
BRIGHTNESS = (70, 186)  # grey levels, half-open: with the texture, never clipped

_STEP = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y)
_ADVERB = {"slow": "slowly", "fast": "quickly"}
_BOUNCE_PHRASE = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}


@dataclass(frozen=True)
class ClipSpec:
    """All that decides the pixels of one clip.

    Lengths in px, `fps` in frames per second, `start_x` and `start_y` the centroid of the shape in frame 0,
    `brightness` the mean grey of the background, `phase` the offset of its texture in px.
    """

    color: str
    shape: str
    direction: str
    background: str
    size: str
    speed: str
    motion: str
    height: int
    width: int
    frames: int
    fps: int
    start_x: float
    start_y: float
    brightness: int
    phase: int = 0


# ---------------------------------------------------------------- pixels


def _extent(shape: str, diameter: float) -> tuple[float, float, float, float]:
    """How far a shape reaches from its centroid: (left, right, up, down), px."""
    if shape == "triangle":  # equilateral, apex up; its centroid lies a third of its height above the base
        half_base = diameter / math.sqrt(3)
        return half_base, half_base, diameter * 2 / 3, diameter / 3
    return (diameter / 2,) * 4


def coverage(shape: str, diameter: float, dx: np.ndarray, dy: np.ndarray, edge: float = 1.0) -> np.ndarray:
    """Share of each pixel that a shape covers, 0..1.

    dx, dy: offsets of the pixel centres from the centroid of the shape, px; diameter: see `SIZES`.
    edge: width of the ramp across the true outline, px; at 1.0 areas are right to 2 %.
    """

    def inside(distance: np.ndarray) -> np.ndarray:  # distance px inside of an edge -> covered share
        return np.clip(0.5 + distance / edge, 0.0, 1.0)

    if shape == "circle":
        return inside(diameter / 2 - np.hypot(dx, dy))
    if shape == "square":
        return inside(diameter / 2 - np.abs(dx)) * inside(diameter / 2 - np.abs(dy))
    if shape == "triangle":
        inscribed = diameter / 3  # radius of the inscribed circle: all three edges are this far away
        slant = inscribed - (math.sqrt(3) * np.abs(dx) - dy) / 2
        return inside(inscribed - dy) * inside(slant)
    raise MegaSoraError(f"shape={shape!r} is unknown; use one of {', '.join(SHAPES)}")


def positions(spec: ClipSpec) -> np.ndarray:
    """Centroid of the shape in every frame, [F, 2] of (x, y) px, on the canvas."""
    step = np.array(_STEP[spec.direction], dtype=np.float64) * SPEEDS[spec.speed]
    path = np.array([spec.start_x, spec.start_y]) + np.arange(spec.frames)[:, None] * step
    canvas = np.array([spec.width, spec.height], dtype=np.float64)
    if spec.motion == "wrap":
        return path % canvas
    left, right, up, down = _extent(spec.shape, SIZES[spec.size])
    low = np.array([left, up])
    room = canvas - np.array([right, down]) - low
    folded = (path - low) % (2 * room)  # a reflected path is a triangle wave of period 2 * room
    return low + np.minimum(folded, 2 * room - folded)


def _background(spec: ClipSpec) -> np.ndarray:
    """Grey levels of the still background, [H, W]."""
    half = TEXTURE_PERIOD // 2
    rows = (np.arange(spec.height) + spec.phase) // half % 2
    columns = (np.arange(spec.width) + spec.phase) // half % 2
    pattern = {
        "plain": np.zeros((spec.height, spec.width)),
        "striped": np.broadcast_to(2.0 * columns - 1.0, (spec.height, spec.width)),
        "checkered": 2.0 * (rows[:, None] ^ columns[None, :]) - 1.0,
    }[spec.background]
    return spec.brightness + TEXTURE_CONTRAST * pattern


def render(spec: ClipSpec) -> np.ndarray:
    """Draw a clip: uint8 [F, H, W, 3], RGB, anti-aliased, a pure function of `spec`."""
    path = positions(spec)

    def offsets(length: int, centres: np.ndarray) -> np.ndarray:  # nearest image on the torus, [F, length]
        raw = np.arange(length)[None, :] + 0.5 - centres[:, None]
        return (raw + length / 2) % length - length / 2

    dx = offsets(spec.width, path[:, 0])[:, None, :]
    dy = offsets(spec.height, path[:, 1])[:, :, None]
    alpha = coverage(spec.shape, SIZES[spec.size], dx, dy)[..., None]
    background = _background(spec)[None, :, :, None]
    ink = np.array(COLORS[spec.color], dtype=np.float64)
    return np.rint(background + alpha * (ink - background)).astype(np.uint8)


# ---------------------------------------------------------------- words


def describe(
    color: str,
    shape: str,
    direction: str | None = None,
    *,
    motion: str = "wrap",
    size: str | None = None,
    speed: str | None = None,
    background: str | None = None,
) -> str:
    """The one caption grammar. What is None is not said; `direction=None` describes a still image."""
    words = ["a", size, color, shape]
    adverb = _ADVERB[speed] if speed else None
    place = f"over a {background} background" if background else None
    if direction is None:
        words += [place]
    elif motion == "bounce":
        words += ["bounces", adverb]
        start = f"first {_BOUNCE_PHRASE[direction]}"
        return ", ".join(part for part in (" ".join(word for word in words if word), start, place) if part)
    else:
        words += ["moves", direction, adverb, place]
    return " ".join(word for word in words if word)


def caption(spec: ClipSpec, rng: np.random.Generator, word_probability: float = 0.6) -> str:
    """A caption of a clip; size word, speed word and background phrase each with `word_probability`."""
    say_size, say_speed, say_background = rng.random(3) < word_probability
    moving = spec.frames > 1
    return describe(
        spec.color,
        spec.shape,
        spec.direction if moving else None,
        motion=spec.motion,
        size=spec.size if say_size else None,
        speed=spec.speed if say_speed and moving else None,
        background=spec.background if say_background else None,
    )


def evaluation_prompts(count: int = 48) -> list[tuple[str, dict[str, str]]]:
    """Balanced prompts over the default world: [(prompt, {color, shape, direction, background})].

    `count` is a multiple of 16; 64 is the full factorial. Otherwise every colour x direction pair takes
    `count / 16` of the four shape x background kinds, chosen by a Latin square: then the kinds are equally
    frequent overall, within each colour and within each direction. Each `HELD_OUT` combination occurs.
    """
    if count < 16 or count % 16:
        raise MegaSoraError(f"count={count} must be a multiple of 16 (4 colors x 4 directions); use 48 or 64")
    # Neighbours differ in shape, so that any two in turn show both shapes.
    kinds = [("circle", "plain"), ("square", "striped"), ("circle", "striped"), ("square", "plain")]
    prompts = []
    for pick in range(count // 16):
        for i, color in enumerate(DEFAULT_COLORS):
            for j, direction in enumerate(DIRECTIONS):
                shape, background = kinds[(i + j + pick) % 4]
                truth = {"color": color, "shape": shape, "direction": direction, "background": background}
                prompts.append((describe(color, shape, direction, background=background), truth))
    return prompts


# ---------------------------------------------------------------- drawing lots


def _check_names(what: str, names: Sequence[str], known: Iterable[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        shown = ", ".join(unknown) or "an empty list"
        raise MegaSoraError(f"{what}: {shown} is unknown; choose from {', '.join(known)}")


def sample_spec(
    rng: np.random.Generator,
    *,
    colors: Sequence[str] = DEFAULT_COLORS,
    shapes: Sequence[str] = DEFAULT_SHAPES,
    backgrounds: Sequence[str] = DEFAULT_BACKGROUNDS,
    bounce_fraction: float = 0.0,
    held_out: bool = False,
    native_sizes: dict[tuple[int, int], float] = NATIVE_SIZES,
    lengths: dict[int, float] = LENGTHS,
    frame_rates: Sequence[int] = FRAME_RATES,
) -> ClipSpec:
    """Draw one clip.

    held_out: False draws (color, shape, direction) outside of `HELD_OUT`, True only from it.
    native_sizes, lengths: (height, width) px and frames, each with a weight.
    Raises MegaSoraError for unknown names and where no combination is left to draw from.
    """
    _check_names("colors", colors, COLORS)
    _check_names("shapes", shapes, SHAPES)
    _check_names("backgrounds", backgrounds, BACKGROUNDS)
    if not 0.0 <= bounce_fraction <= 1.0:
        raise MegaSoraError(f"bounce_fraction={bounce_fraction} is a share of the clips; use 0 to 1")
    combinations = [each for each in product(colors, shapes, DIRECTIONS) if (each in HELD_OUT) == held_out]
    if not combinations:
        kind = "held-out" if held_out else "training"
        chosen = f"colors={','.join(colors)} and shapes={','.join(shapes)}"
        raise MegaSoraError(f"{chosen} leave no {kind} combination to draw; add a color or a shape")

    def draw(weights: dict):
        shares = np.fromiter(weights.values(), dtype=np.float64)
        return list(weights)[rng.choice(len(weights), p=shares / shares.sum())]

    color, shape, direction = combinations[rng.integers(len(combinations))]
    background = backgrounds[rng.integers(len(backgrounds))]
    size = tuple(SIZES)[rng.integers(len(SIZES))]
    speed = tuple(SPEEDS)[rng.integers(len(SPEEDS))]
    motion = "bounce" if rng.random() < bounce_fraction else "wrap"
    height, width = draw(native_sizes)
    frames = draw(lengths)
    fps = int(frame_rates[rng.integers(len(frame_rates))])
    low, high = [0, 0], [width - 1, height - 1]  # whole-pixel starts: fewer appearances to learn
    if motion == "bounce":
        left, right, up, down = _extent(shape, SIZES[size])
        low, high = [math.ceil(left), math.ceil(up)], [math.floor(width - right), math.floor(height - down)]
        axis, sign = (0, _STEP[direction][0]) if _STEP[direction][0] else (1, _STEP[direction][1])
        run_up = 2 * SPEEDS[speed]  # two whole steps before the first wall, or the caption would not be seen
        if sign > 0:
            high[axis] = max(low[axis], high[axis] - run_up)
        else:
            low[axis] = min(high[axis], low[axis] + run_up)
    start_x, start_y = (float(rng.integers(a, b + 1)) for a, b in zip(low, high, strict=True))
    return ClipSpec(
        color=color,
        shape=shape,
        direction=direction,
        background=background,
        size=size,
        speed=speed,
        motion=motion,
        height=height,
        width=width,
        frames=frames,
        fps=fps,
        start_x=start_x,
        start_y=start_y,
        brightness=int(rng.integers(*BRIGHTNESS)),
        phase=TEXTURE_PHASES[rng.integers(len(TEXTURE_PHASES))],
    )


def clip_at(seed: int, split: str, index: int, **choices) -> tuple[ClipSpec, str]:
    """Clip `index` of a split ("train" or "val") and its caption: a pure function of (seed, split, index).

    Training never draws `HELD_OUT`. In validation every fourth clip comes from it, where the chosen colors
    and shapes contain any of it. `choices` go to `sample_spec`.
    """
    if split not in SPLITS:
        raise MegaSoraError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    colors, shapes = choices.get("colors", DEFAULT_COLORS), choices.get("shapes", DEFAULT_SHAPES)
    available = any(color in colors and shape in shapes for color, shape, _ in HELD_OUT)
    spec = sample_spec(rng, held_out=split == "val" and index % 4 == 3 and available, **choices)
    return spec, caption(spec, rng)


# ---------------------------------------------------------------- files


def write_clip(spec: ClipSpec, caption: str, path_stem: str | Path, *, lossless: bool = False) -> Path:
    """Write STEM.mp4 (H.264) or, of one frame, STEM.png, and its caption in STEM.txt; returns the path.

    lossless: keep every RGB value (H.264 in RGB, quantiser 0) instead of yuv420p at crf 10.
    Each file appears whole or not at all, the caption first: a clip on disk always has its caption.
    """
    stem = Path(path_stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    _replace_text(stem.with_name(stem.name + ".txt"), caption + "\n")
    path = stem.with_name(stem.name + (".mp4" if spec.frames > 1 else ".png"))
    if spec.frames > 1:
        write_video(render(spec), spec.fps, path, codec="libx264rgb" if lossless else "libx264")
    else:
        write_image(render(spec)[0], path)
    return path


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name("." + path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@dataclass(frozen=True)
class DatasetSummary:
    """What `write_dataset` wrote of one split: clips, of these images, frames, seconds of video, bytes."""

    split: str
    clips: int
    images: int
    frames: int
    seconds: float
    bytes: int


_Written = tuple[int, int, int]  # frames, fps, bytes of one clip


def _write_range(out: str, split: str, seed: int, indices: Sequence[int], choices: dict) -> list[_Written]:
    """Write some clips of a split. At the top level, so that worker processes find it."""
    written = []
    for index in indices:
        spec, text = clip_at(seed, split, index, **choices)
        path = write_clip(spec, text, Path(out) / split / f"clip-{index:06d}")
        written.append((spec.frames, spec.fps, path.stat().st_size))
    return written


def write_dataset(
    out: str | Path,
    clips: int,
    validation_clips: int,
    seed: int = 0,
    *,
    colors: Sequence[str] = DEFAULT_COLORS,
    shapes: Sequence[str] = DEFAULT_SHAPES,
    backgrounds: Sequence[str] = DEFAULT_BACKGROUNDS,
    bounce_fraction: float = 0.0,
    processes: int = 2,
    show_progress: bool = True,
) -> list[DatasetSummary]:
    """Write OUT/train/clip-000000.mp4|png + .txt and OUT/val/...; one summary per split.

    processes: the most worker processes to use, never more than there are cores; 1 writes in this process.
    Raises MegaSoraError where `out` is not an empty or absent folder, or a number makes no sense.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MegaSoraError(f"{out} is not an empty folder; remove it, or choose another folder with --out")
    if clips < 0 or validation_clips < 0 or clips + validation_clips == 0:
        raise MegaSoraError(f"clips={clips} and validation clips={validation_clips}: give at least one clip")
    if seed < 0:
        raise MegaSoraError(f"seed={seed} must be 0 or more")
    if processes < 1:
        raise MegaSoraError(f"processes={processes} must be at least 1")
    choices = {
        "colors": tuple(colors),
        "shapes": tuple(shapes),
        "backgrounds": tuple(backgrounds),
        "bounce_fraction": bounce_fraction,
    }
    counts = {"train": clips, "val": validation_clips}
    for split, count in counts.items():
        if count:
            clip_at(seed, split, 0, **choices)  # refuse bad choices before the first file
            (out / split).mkdir(parents=True, exist_ok=True)
    tasks = [
        (split, range(start, min(start + 16, count)))
        for split, count in counts.items()
        for start in range(0, count, 16)
    ]
    workers = min(processes, os.cpu_count() or 1, len(tasks))
    rows: dict[str, list[_Written]] = {split: [] for split in SPLITS}

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show_progress) as progress:
        bar = progress.add_task(f"clips to {out}", total=clips + validation_clips)

        def keep(split: str, written: list[_Written]) -> None:
            rows[split] += written
            progress.advance(bar, len(written))

        if workers == 1:
            for split, indices in tasks:
                keep(split, _write_range(str(out), split, seed, indices, choices))
        else:
            from concurrent.futures import ProcessPoolExecutor, as_completed
            from multiprocessing import get_context

            # spawn: a forked child would inherit the locks of whatever threads the caller runs
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                jobs = {pool.submit(_write_range, str(out), s, seed, i, choices): s for s, i in tasks}
                for job in as_completed(jobs):
                    keep(jobs[job], job.result())
    return [
        DatasetSummary(
            split=split,
            clips=len(row),
            images=sum(frames == 1 for frames, _, _ in row),
            frames=sum(frames for frames, _, _ in row),
            seconds=sum(frames / fps for frames, fps, _ in row if frames > 1),
            bytes=sum(size for _, _, size in row),
        )
        for split, row in rows.items()
        if row
    ]
