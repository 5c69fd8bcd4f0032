"""Files of procedural clips: H.264 mp4 or PNG with the caption in NAME.txt beside it, and folders of them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megasora.data.clip_writer import write_image, write_video
from megasora.errors import MegaSoraError
from megasora.files import write_text_atomic
from megasora.testing.clips import (
    DEFAULT_BACKGROUNDS,
    DEFAULT_COLORS,
    DEFAULT_SHAPES,
    ClipSpec,
    clip_at,
    render,
)

CLIPS_PER_TASK = 16


def write_clip(spec: ClipSpec, caption: str, path_stem: str | Path, *, lossless: bool = False) -> Path:
    """Writes STEM.mp4 (H.264) or, for one frame, STEM.png, and its caption in STEM.txt; returns the path of the clip.

    lossless: keeps every RGB value (H.264 in RGB, quantiser 0) instead of yuv420p at crf 10.
    Each file is written atomically, the caption first: a clip on disk always has its caption.
    """
    stem = Path(path_stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(stem.with_name(stem.name + ".txt"), caption + "\n")
    path = stem.with_name(stem.name + (".mp4" if spec.frames > 1 else ".png"))
    if spec.frames > 1:
        write_video(render(spec), spec.fps, path, codec="libx264rgb" if lossless else "libx264")
    else:
        write_image(render(spec)[0], path)
    return path


@dataclass(frozen=True)
class SplitSummary:
    """What `write_dataset` wrote for one split: clips, how many are images, frames, seconds of video, bytes."""

    split: str
    clips: int
    images: int
    frames: int
    seconds: float
    bytes: int


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
) -> list[SplitSummary]:
    """Writes OUT/train/clip-000000.mp4|png + .txt and OUT/val/...; returns one summary per split.

    processes: largest number of worker processes, never more than there are cores; 1 writes in this process.
    Raises MegaSoraError where `out` is not an empty or absent folder, or an argument is out of range.
    """
    out = Path(out)
    check_arguments(out, clips, validation_clips, seed, processes)
    choices = {
        "colors": tuple(colors),
        "shapes": tuple(shapes),
        "backgrounds": tuple(backgrounds),
        "bounce_fraction": bounce_fraction,
    }
    counts = {split: count for split, count in (("train", clips), ("val", validation_clips)) if count}
    for split in counts:
        clip_at(seed, split, 0, **choices)  # raises for bad choices before the first file is written
        (out / split).mkdir(parents=True, exist_ok=True)
    tasks = [
        (str(out), split, seed, range(start, min(start + CLIPS_PER_TASK, count)), choices)
        for split, count in counts.items()
        for start in range(0, count, CLIPS_PER_TASK)
    ]
    written: dict[str, list[_WrittenClip]] = defaultdict(list)

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show_progress) as progress:
        bar = progress.add_task(f"clips to {out}", total=clips + validation_clips)
        for split, some in run_tasks(tasks, min(processes, os.cpu_count() or 1, len(tasks))):
            written[split] += some
            progress.advance(bar, len(some))
    return [summarize(split, written[split]) for split in counts]


def check_arguments(out: Path, clips: int, validation_clips: int, seed: int, processes: int) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MegaSoraError(f"{out} is not an empty folder; remove it, or choose another folder with --out")
    if clips < 0 or validation_clips < 0 or clips + validation_clips == 0:
        raise MegaSoraError(f"clips={clips} and validation clips={validation_clips}: give at least one clip")
    if seed < 0:
        raise MegaSoraError(f"seed={seed} must be 0 or more")
    if processes < 1:
        raise MegaSoraError(f"processes={processes} must be at least 1")


_WrittenClip = tuple[int, int, int]  # frames, fps, bytes
_Task = tuple[str, str, int, Sequence[int], dict]  # arguments of `write_some`


def run_tasks(tasks: list[_Task], workers: int) -> Iterator[tuple[str, list[_WrittenClip]]]:
    """Runs `write_some` for each task, in this process or in `workers` others; yields results as they complete."""
    if workers == 1:
        yield from (write_some(task) for task in tasks)
        return
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    # spawn: a forked child would inherit the locks of the threads that the caller runs
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(write_some, task) for task in tasks]):
            yield future.result()


def write_some(task: _Task) -> tuple[str, list[_WrittenClip]]:
    """Writes some clips of a split; returns the split and what was written. A module function, so it can be pickled."""
    out, split, seed, indices, choices = task
    written = []
    for index in indices:
        spec, caption = clip_at(seed, split, index, **choices)
        path = write_clip(spec, caption, Path(out) / split / f"clip-{index:06d}")
        written.append((spec.frames, spec.fps, path.stat().st_size))
    return split, written


def summarize(split: str, written: list[_WrittenClip]) -> SplitSummary:
    return SplitSummary(
        split=split,
        clips=len(written),
        images=sum(frames == 1 for frames, _, _ in written),
        frames=sum(frames for frames, _, _ in written),
        seconds=sum(frames / fps for frames, fps, _ in written if frames > 1),
        bytes=sum(size for _, _, size in written),
    )
