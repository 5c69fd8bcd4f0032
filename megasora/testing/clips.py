"""Procedural captioned clips: a data set that is simple enough to learn on a CPU.

    seed, split, index --clip_at--> ClipSpec, caption;   ClipSpec --render--> uint8 frames [F, H, W, 3]

`clip_files.py` writes them, `detector.py` reads colour, shape, motion and background back from frames.

One coloured shape moves over a grey background, so each word of the caption can be read back from the pixels without
a learned model, and "does the model follow the text" becomes a number. The canvas is a torus (motion `wrap`): without
wrap-around, the start position would reveal the direction, and a model could ignore the text. Backgrounds are grey and
shapes saturated, so the chroma of a pixel gives the coverage by the shape.

Coordinates are pixels, x to the right and y down, pixel (0, 0) covering [0, 1) x [0, 1). Sizes are absolute: a small
shape measures 10 px on every canvas.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from megasora.errors import MegaSoraError

COLORS = {  # name -> RGB; one saturation for all, hues at least 60 degrees apart
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
SPEEDS = {"slow": 2, "fast": 3}  # px per frame; at 1 px per frame, small models do not learn motion
MOTIONS = ("wrap", "bounce")
SPLITS = ("train", "val")

DEFAULT_COLORS = ("red", "green", "blue", "yellow")
DEFAULT_SHAPES = ("circle", "square")
DEFAULT_BACKGROUNDS = ("plain", "striped")

# (color, shape, direction) never used in training: each color once, each direction once, each shape twice.
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

TEXTURE_PERIOD = 8  # px; divides every canvas, so textures are continuous on the torus
TEXTURE_CONTRAST = 26  # grey levels above and below the brightness
# Texture edges are at multiples of 4 px: then each 8 px block holds one step, which low frequencies represent.
TEXTURE_PHASES = (0, 4)  # px
BRIGHTNESS = (70, 186)  # grey levels, half-open range: never clipped, also with the texture

_STEP = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y)
_ADVERB = {"slow": "slowly", "fast": "quickly"}
_BOUNCE_PHRASE = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}


@dataclass(frozen=True)
class ClipSpec:
    """Everything that determines the pixels of one clip.

    Lengths are in px, `fps` in frames per second; `start_x` and `start_y` are the centroid of the shape in frame 0,
    `brightness` the mean grey level of the background, `phase` the offset of its texture in px.
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
    """Distances from the centroid of a shape to its edges: (left, right, up, down), px."""
    if shape == "triangle":  # equilateral, apex up; the centroid is a third of the height above the base
        half_base = diameter / math.sqrt(3)
        return half_base, half_base, diameter * 2 / 3, diameter / 3
    return (diameter / 2,) * 4


def coverage(shape: str, diameter: float, dx: np.ndarray, dy: np.ndarray, edge: float = 1.0) -> np.ndarray:
    """Fraction of each pixel that a shape covers, 0 to 1.

    dx, dy: offsets of the pixel centres from the centroid of the shape, px; diameter: see `SIZES`.
    edge: width of the ramp across the true outline, px; at 1.0, areas are correct within 2 %.
    Raises MegaSoraError for an unknown shape.
    """

    def inside(distance: np.ndarray) -> np.ndarray:  # distance in px inside an edge -> covered fraction
        return np.clip(0.5 + distance / edge, 0.0, 1.0)

    if shape == "circle":
        return inside(diameter / 2 - np.hypot(dx, dy))
    if shape == "square":
        return inside(diameter / 2 - np.abs(dx)) * inside(diameter / 2 - np.abs(dy))
    if shape == "triangle":
        inscribed = diameter / 3  # radius of the inscribed circle: the distance of all three edges
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
    span = canvas - np.array([right, down]) - low
    folded = (path - low) % (2 * span)  # a reflected path is a triangle wave of period 2 * span
    return low + np.minimum(folded, 2 * span - folded)


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
    """Draws a clip: uint8 [F, H, W, 3], RGB, anti-aliased; a pure function of `spec`."""
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


# ---------------------------------------------------------------- captions


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
    """A caption with the given words. Arguments that are None are left out; `direction=None` describes an image."""
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
    """A caption of a clip; it has size, speed and background with probability `word_probability` each."""
    with_size, with_speed, with_background = rng.random(3) < word_probability
    moving = spec.frames > 1
    return describe(
        spec.color,
        spec.shape,
        spec.direction if moving else None,
        motion=spec.motion,
        size=spec.size if with_size else None,
        speed=spec.speed if with_speed and moving else None,
        background=spec.background if with_background else None,
    )


def evaluation_prompts(count: int = 48) -> list[tuple[str, dict[str, str]]]:
    """Balanced prompts over the default choices: [(prompt, {color, shape, direction, background})].

    `count` must be a multiple of 16; 64 is the full factorial. Otherwise every colour x direction pair gets
    `count / 16` of the four shape x background kinds, chosen by a Latin square, so that the kinds are equally
    frequent overall, per colour and per direction. Each `HELD_OUT` combination occurs. Raises MegaSoraError.
    """
    if count < 16 or count % 16:
        raise MegaSoraError(f"count={count} must be a multiple of 16 (4 colors x 4 directions); use 48 or 64")
    # Neighbours differ in shape, so that any two consecutive ones show both shapes.
    kinds = [("circle", "plain"), ("square", "striped"), ("circle", "striped"), ("square", "plain")]
    prompts = []
    for offset in range(count // 16):
        for i, color in enumerate(DEFAULT_COLORS):
            for j, direction in enumerate(DIRECTIONS):
                shape, background = kinds[(i + j + offset) % 4]
                truth = {"color": color, "shape": shape, "direction": direction, "background": background}
                prompts.append((describe(color, shape, direction, background=background), truth))
    return prompts


# ---------------------------------------------------------------- random clips


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
    """Draws a random clip.

    held_out: if False, (color, shape, direction) is not in `HELD_OUT`; if True, it is.
    native_sizes, lengths: (height, width) px and frames, each with a weight.
    Raises MegaSoraError for unknown names and where no combination is possible.
    """
    _check_names("colors", colors, COLORS)
    _check_names("shapes", shapes, SHAPES)
    _check_names("backgrounds", backgrounds, BACKGROUNDS)
    if not 0.0 <= bounce_fraction <= 1.0:
        raise MegaSoraError(f"bounce_fraction={bounce_fraction} is a fraction of the clips; use 0 to 1")
    combinations = [c for c in product(colors, shapes, DIRECTIONS) if (c in HELD_OUT) == held_out]
    if not combinations:
        kind = "held-out" if held_out else "training"
        chosen = f"colors={','.join(colors)} and shapes={','.join(shapes)}"
        raise MegaSoraError(f"{chosen} leave no {kind} combination to draw; add a color or a shape")

    def draw(weights: dict):
        p = np.fromiter(weights.values(), dtype=np.float64)
        return list(weights)[rng.choice(len(weights), p=p / p.sum())]

    color, shape, direction = combinations[rng.integers(len(combinations))]
    background = backgrounds[rng.integers(len(backgrounds))]
    size = tuple(SIZES)[rng.integers(len(SIZES))]
    speed = tuple(SPEEDS)[rng.integers(len(SPEEDS))]
    motion = "bounce" if rng.random() < bounce_fraction else "wrap"
    height, width = draw(native_sizes)
    frames = draw(lengths)
    fps = int(frame_rates[rng.integers(len(frame_rates))])
    low, high = _start_range(shape, direction, size, speed, motion, height, width)
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


def _start_range(
    shape: str, direction: str, size: str, speed: str, motion: str, height: int, width: int
) -> tuple[list[int], list[int]]:
    """Lowest and highest (x, y) px of the start position, both included. Integers: fewer appearances to learn."""
    if motion == "wrap":
        return [0, 0], [width - 1, height - 1]
    left, right, up, down = _extent(shape, SIZES[size])
    low, high = [math.ceil(left), math.ceil(up)], [math.floor(width - right), math.floor(height - down)]
    axis, sign = (0, _STEP[direction][0]) if _STEP[direction][0] else (1, _STEP[direction][1])
    run_up = 2 * SPEEDS[speed]  # two whole steps before the first wall, so that the first direction is visible
    if sign > 0:
        high[axis] = max(low[axis], high[axis] - run_up)
    else:
        low[axis] = min(high[axis], low[axis] + run_up)
    return low, high


def clip_at(seed: int, split: str, index: int, **choices) -> tuple[ClipSpec, str]:
    """Clip `index` of a split ("train" or "val") and its caption: a pure function of (seed, split, index).

    Training never contains `HELD_OUT`. In validation every fourth clip is from it, if the chosen colors and shapes
    allow any. `choices` are passed to `sample_spec`.
    """
    if split not in SPLITS:
        raise MegaSoraError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    colors, shapes = choices.get("colors", DEFAULT_COLORS), choices.get("shapes", DEFAULT_SHAPES)
    available = any(color in colors and shape in shapes for color, shape, _ in HELD_OUT)
    spec = sample_spec(rng, held_out=split == "val" and index % 4 == 3 and available, **choices)
    return spec, caption(spec, rng)
