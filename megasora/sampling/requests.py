"""Request: what a person asks for, as the flags of `megasora sample` or a line of a prompts file say it.

    flags, or {"prompt": "...", "video": "in.mp4", "extend": "2s"}  --> Request

A line has the flags as keys, with `_` for `-`; its paths are relative to the file. Nothing is opened here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasora.config import parse_size
from megasora.data.clip_writer import MAX_FPS, MIN_FPS
from megasora.errors import MegaSoraError, printable

MAX_PROMPT_BYTES = 1 << 16
MAX_SEED = 1 << 63
MAX_FRAMES = 10**10  # a year at 300 frames per second
LENGTH = re.compile(r"([0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})(s?)")
CONTROLS = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f]")  # not tab, newline and carriage return


@dataclass(frozen=True)
class Length:
    """A length of video: `amount` frames, or seconds."""

    amount: float
    in_seconds: bool

    @classmethod
    def parse(cls, text: str, flag: str) -> Length:
        """`16` or `2s`. Raises MegaSoraError."""
        parts = LENGTH.fullmatch(text)
        amount = float(parts[1]) if parts else 0.0
        in_seconds = bool(parts and parts[2])
        if amount <= 0 or not (in_seconds or amount.is_integer()):
            raise MegaSoraError(
                f"{flag} {printable(text, 60)} is not a length: give a number of frames, e.g. 16, or seconds, e.g. 2s"
            )
        return cls(amount, in_seconds)

    def frames(self, fps: float) -> int:
        """The nearest number of frames, at least one."""
        return max(1, round(self.amount * fps)) if self.in_seconds else int(self.amount)

    def __str__(self) -> str:
        return f"{self.amount:g}{'s' if self.in_seconds else ''}"


@dataclass(frozen=True)
class Keyframe:
    """An image and the number of the frame that it is."""

    file: Path
    index: int

    @classmethod
    def parse(cls, text: str, flag: str) -> Keyframe:
        """`FILE:INDEX`. Raises MegaSoraError."""
        name, _, index = text.rpartition(":")
        if not name or not re.fullmatch("-?[0-9]{1,12}", index):
            raise MegaSoraError(f"{flag} {printable(text, 60)} is not FILE:FRAME, e.g. last.png:16")
        return cls(Path(name), int(index))


@dataclass(frozen=True)
class Request:
    """A clip to sample. `check` says which combinations there are."""

    prompt: str
    negative_prompt: str | None = None
    image: Path | None = None  # the first frame
    last_image: Path | None = None
    video: Path | None = None
    extend: Length | None = None
    prepend: Length | None = None
    loop: bool = False
    edit: float | None = None
    mask: Path | None = None
    connect: tuple[Path, Path] | None = None
    keyframes: tuple[Keyframe, ...] = ()
    size: str | None = None
    frames: int | None = None
    fps: float | None = None
    seed: int = 0

    @classmethod
    def from_values(cls, values: Mapping[str, Any], folder: Path | None = None) -> Request:
        """The request of these values, checked; None is as if absent. Raises MegaSoraError.

        `folder`: what paths are relative to. Values are of JSON, or of the command line: numbers, texts and paths.
        """
        unknown = [key for key in values if key not in PARSERS]
        if unknown:
            raise MegaSoraError(f"unknown key '{printable(str(unknown[0]), 60)}'; known keys: {', '.join(PARSERS)}")
        parsed = {key: PARSERS[key](value, flag(key)) for key, value in values.items() if value is not None}
        request = cls(**{"prompt": ""} | parsed)
        request.check()
        return request if folder is None else request.relative_to(folder)

    @property
    def kind(self) -> str:
        """text | image | keyframes | extend | prepend | loop | edit | connect."""
        for name in ("extend", "prepend", "loop", "connect", "keyframes"):
            if getattr(self, name):
                return name
        if self.edit is not None:
            return "edit"
        return "image" if self.image or self.last_image else "text"

    @property
    def files(self) -> dict[str, Path]:
        """The given files, by what names them."""
        single = {flag(key): getattr(self, key) for key in ("image", "last_image", "video", "mask")}
        files = {name: path for name, path in single.items() if path is not None}
        files |= {f"--connect {number}": path for number, path in enumerate(self.connect or (), 1)}
        return files | {f"--keyframes {keyframe.index}": keyframe.file for keyframe in self.keyframes}

    def relative_to(self, folder: Path) -> Request:
        """With paths from `folder`, unless they are absolute."""
        moved = {key: folder / path for key in PATHS if (path := getattr(self, key)) is not None}
        if self.connect:
            moved["connect"] = tuple(folder / path for path in self.connect)
        keyframes = tuple(dataclasses.replace(k, file=folder / k.file) for k in self.keyframes)
        return dataclasses.replace(self, keyframes=keyframes, **moved)

    def values(self) -> dict[str, Any]:
        """The values that are given, for a JSON file."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["keyframes"] = [f"{k.file}:{k.index}" for k in self.keyframes]
        values["connect"] = [str(path) for path in self.connect or ()]
        given = {key: value for key, value in values.items() if value or key in ("prompt", "negative_prompt", "seed")}
        plain = (str, int, float, bool, list)
        return {k: v if isinstance(v, plain) else str(v) for k, v in given.items() if v is not None}

    def check(self) -> None:
        """Raises MegaSoraError for values out of bounds, and for flags that contradict each other."""
        check_text("--prompt", self.prompt)
        if not self.prompt.strip():
            raise MegaSoraError("--prompt is empty; describe the clip, e.g. --prompt 'a red circle moves right'")
        if self.negative_prompt is not None:
            check_text("--negative-prompt", self.negative_prompt)
        self.check_numbers()
        self.check_kind()

    def check_numbers(self) -> None:
        if self.frames is not None and not 1 <= self.frames <= MAX_FRAMES:
            raise MegaSoraError(f"--frames {self.frames} must be at least 1 and at most {MAX_FRAMES}")
        if self.fps is not None and not MIN_FPS <= self.fps <= MAX_FPS:
            raise MegaSoraError(f"--fps {self.fps} must be from {MIN_FPS} to {MAX_FPS}")
        if not 0 <= self.seed < MAX_SEED:
            raise MegaSoraError(f"--seed {self.seed} must be from 0 to below 2^63")
        if self.edit is not None and not 0 < self.edit <= 1:
            raise MegaSoraError(
                f"--edit {self.edit:g} must be above 0 (nothing changes) and at most 1 (nothing is kept)"
            )
        if self.size is not None and min(parse_size(self.size, "--size")) < 1:
            raise MegaSoraError(f"--size {self.size} must have at least one pixel on each side")

    def check_kind(self) -> None:
        sources = [name for name in ("image", "last_image", "video", "connect", "keyframes") if getattr(self, name)]
        if len(sources) > 1 and sources != ["image", "last_image"]:
            raise MegaSoraError(
                f"{flag(sources[0])} and {flag(sources[-1])} exclude each other; give frames of a clip as --keyframes, "
                "a video to continue as --video"
            )
        uses = [name for name in USES if getattr(self, name) not in (None, False)]
        options = "one of --extend, --prepend, --loop and --edit"
        if self.video and len(uses) != 1:
            raise MegaSoraError(f"--video needs {options}" + (f", not {len(uses)} of them" if uses else ""))
        if uses and not self.video:
            raise MegaSoraError(f"{flag(uses[0])} needs the --video that it is about")
        if self.mask and self.edit is None:
            raise MegaSoraError("--mask needs --edit: it says which pixels of the --video may change")
        fixed = next((name for name in ("extend", "prepend", "edit") if name in uses), None)
        if fixed and self.frames is not None:
            reason = "changes the frames of the video" if fixed == "edit" else "says how many frames are new"
            raise MegaSoraError(f"--frames {self.frames} and {flag(fixed)} exclude each other: {flag(fixed)} {reason}")
        self.check_keyframes()

    def check_keyframes(self) -> None:
        numbers = [keyframe.index for keyframe in self.keyframes]
        for number in numbers:
            if number < 0 or (self.frames is not None and number >= self.frames):
                end = "" if self.frames is None else f" to {self.frames - 1}, as --frames {self.frames} says"
                raise MegaSoraError(f"--keyframes: there is no frame {number}; frames are counted from 0{end}")
            if numbers.count(number) > 1:
                raise MegaSoraError(f"--keyframes gives frame {number} more than once; give one image for it")
        if self.frames is not None and len(numbers) > self.frames:
            raise MegaSoraError(f"--keyframes gives {len(numbers)} frames, --frames {self.frames}; give more --frames")
        if self.last_image and self.image and self.frames == 1:
            raise MegaSoraError("--frames 1 with --image and --last-image: give at least 2 --frames")


def check_text(name: str, text: str) -> None:
    """Raises MegaSoraError for text that is no UTF-8, is longer than MAX_PROMPT_BYTES, or has control characters."""
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise MegaSoraError(f"{name} is not UTF-8 text: {error}") from None
    if size > MAX_PROMPT_BYTES:
        raise MegaSoraError(f"{name} has {size} bytes; at most {MAX_PROMPT_BYTES} are read: shorten it")
    if control := CONTROLS.search(text):
        raise MegaSoraError(
            f"{name} has the control character {ascii(control[0])} at position {control.start()}; remove it"
        )


def flag(key: str) -> str:
    """`last_image` -> `--last-image`."""
    return f"--{key.replace('_', '-')}"


# ---------------------------------------------------------------- values


def parse_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise wrong(value, name, "a text")
    return value


def parse_path(value: Any, name: str) -> Path:
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value or "\0" in value:
        raise wrong(value, name, "the path of a file")
    return Path(value).expanduser() if value.startswith("~/") else Path(value)


def parse_length(value: Any, name: str) -> Length:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise wrong(value, name, "a number of frames, or seconds, e.g. 2s")
    return Length.parse(str(value), name)


def parse_flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise wrong(value, name, "true or false")
    return value


def parse_int(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong(value, name, "a whole number")
    return value


def parse_float(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or math.isnan(value):
        raise wrong(value, name, "a number")
    return float(value)


def parse_two_paths(value: Any, name: str) -> tuple[Path, Path]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise wrong(value, name, "two videos")
    return parse_path(value[0], name), parse_path(value[1], name)


def parse_keyframes(value: Any, name: str) -> tuple[Keyframe, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise wrong(value, name, "a list of FILE:FRAME")
    return tuple(Keyframe.parse(item, name) for item in value)


def wrong(value: Any, name: str, expected: str) -> MegaSoraError:
    return MegaSoraError(f"{name} {printable(str(value), 60)} is not {expected}")


USES = ("extend", "prepend", "loop", "edit")  # of --video
PATHS = ("image", "last_image", "video", "mask")
PARSERS = {
    "prompt": parse_text, "negative_prompt": parse_text, "image": parse_path, "last_image": parse_path,
    "video": parse_path, "extend": parse_length, "prepend": parse_length, "loop": parse_flag, "edit": parse_float,
    "mask": parse_path, "connect": parse_two_paths, "keyframes": parse_keyframes, "size": parse_text,
    "frames": parse_int, "fps": parse_float, "seed": parse_int,
}  # fmt: skip
