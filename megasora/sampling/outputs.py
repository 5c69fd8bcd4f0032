"""Writes a sampled clip: OUT.mp4 or OUT.png, OUT.sheet.png (a contact sheet) and last OUT.json (the signed record).

Frames are read, measured and written one by one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megasora.data.clip_writer import write_frames, write_image
from megasora.errors import MegaSoraError
from megasora.files import errors_naming, write_text_atomic
from megasora.sampling.clip_plan import ClipPlan
from megasora.sampling.provenance import signed_record
from megasora.sampling.seams import Steps, psnr
from megasora.sampling.sheet import contact_sheet
from megasora.sampling.timeline import Timeline
from megasora.sampling.watermark import apply_watermark

SHEET_FRAMES = 8


def check_output_path(out: Path) -> None:
    """Raises MegaSoraError unless `out` is the name of an .mp4 or .png file in a folder that exists."""
    if out.suffix not in (".mp4", ".png"):
        raise MegaSoraError(f"--out {out} must end in .mp4, or .png for one frame")
    if not out.parent.is_dir():
        raise MegaSoraError(f"--out {out}: there is no folder {out.parent}; make it first")
    if out.is_dir():
        raise MegaSoraError(f"--out {out} is a folder; give the name of a file")


def check_output(out: Path, plan: ClipPlan) -> None:
    """Raises MegaSoraError if `out` is of the wrong kind for a clip, or one of its given files."""
    check_kind_of_output(out, plan.num_frames)
    for name, path in plan.request.files.items():
        for written in (out, *beside(out)):
            if written.exists() and path.exists() and written.samefile(path):
                raise MegaSoraError(f"--out {out} would replace {written}, which is given as {name}; give another name")


def check_kind_of_output(out: Path, frames: int) -> None:
    if (frames == 1) != (out.suffix == ".png"):
        raise MegaSoraError(f"--out {out} with --frames {frames}: an image is .png, a video .mp4")


def beside(out: Path) -> tuple[Path, Path]:
    """The paths of the contact sheet and of the sidecar."""
    return out.with_suffix(".sheet.png"), out.with_suffix(".json")


class ResultFrames:
    """The frames of a result, which are read once: marked, measured, and a few kept for the contact sheet."""

    def __init__(self, plan: ClipPlan, timeline: Timeline, frames_FHWC: np.ndarray, is_marked: bool):
        self.plan, self.timeline, self.frames_FHWC, self.is_marked = plan, timeline, frames_FHWC, is_marked
        self.steps = Steps()
        self.kept: list[np.ndarray] = []  # for the contact sheet
        self.psnr: dict[int, float] = {}  # of given images, by frame

    def __iter__(self) -> Iterator[np.ndarray]:
        count = self.plan.num_frames
        on_sheet = set(np.linspace(0, count - 1, min(SHEET_FRAMES, count)).round().astype(int).tolist())
        given = {
            block.first: block.frames_FHWC[0]
            for block in self.timeline.given
            if block.level == 0 and not block.is_returned
        }
        masks = self.timeline.mask_FHW
        for i, (frame, number) in enumerate(self.plan.result(self.timeline, self.frames_FHWC)):
            if self.is_marked and number is not None:
                frame = marked(frame, None if masks is None else masks[number])
            self.steps.add(frame)
            if i in on_sheet:
                self.kept.append(np.array(frame))
            if i in given:
                self.psnr[i] = psnr(frame, given[i])
            yield frame

    def measured(self) -> dict[str, Any]:
        """What was measured, after the last frame."""
        values: dict[str, Any] = {"seams": self.steps.seams(self.plan.seams)} if self.plan.seams else {}
        if self.psnr:
            values["psnr_of_given_frames"] = {str(i): round(value, 2) for i, value in self.psnr.items()}
        return values


def marked(frame_HWC: np.ndarray, mask_HW: np.ndarray | None = None) -> np.ndarray:
    """A sampled frame with the watermark, where the mask is True."""
    frame = apply_watermark(frame_HWC)
    return frame if mask_HW is None else np.where(mask_HW[..., None], frame, frame_HWC)


def write_clip(
    plan: ClipPlan,
    timeline: Timeline,
    frames_FHWC: np.ndarray,
    out: Path,
    comment: str,
    record: dict[str, Any],
    is_marked: bool,
) -> None:
    """Writes the result and what is beside it. `frames_FHWC`: of the timeline. `comment`: into the files. `is_marked`:
    sampled frames get the watermark."""
    frames = ResultFrames(plan, timeline, frames_FHWC, is_marked)
    sheet = lambda: [(plan.request.prompt, np.stack(frames.kept))]  # noqa: E731
    whole_record = lambda: record | {"measured": frames.measured()}  # noqa: E731
    write_result(out, frames, (plan.height, plan.width), plan.fps, comment, sheet, whole_record)


def write_result(
    out: Path,
    frames: Iterable[np.ndarray],
    size: tuple[int, int],
    fps: float,
    comment: str,
    sheet: Callable[[], list[tuple[str, np.ndarray]]],
    record: Callable[[], dict[str, Any]],
) -> None:
    """Writes frames, then what `sheet()` returns as a contact sheet, then `record()`, signed; each file atomically."""
    sheet_path, sidecar = beside(out)
    with errors_naming(out, part_of(out)):
        if out.suffix == ".png":
            write_image(next(iter(frames)), out, comment)
        else:
            write_frames(frames, size, fps, out, comment)
    with errors_naming(sheet_path, part_of(sheet_path)):
        write_image(contact_sheet(sheet()), sheet_path, comment)
    write_text_atomic(sidecar, json.dumps(signed_record(record(), out), indent=1) + "\n")


def part_of(path: Path) -> Path:
    """The file that is written first and then renamed."""
    return path.with_name(f".{path.name}.part")


def record_of(plan: ClipPlan, comment: str, settings: Any, hashes: dict[str, str], **more: Any) -> dict[str, Any]:
    """What the sidecar says: how the clip was made, and from which files."""
    request = plan.request
    return {
        **json.loads(comment), "kind": request.kind, "size": f"{plan.height}x{plan.width}", "frames": plan.num_frames,
        "new_frames": plan.new_frames, "fps": plan.fps, "request": request.values(),
        "settings": dataclasses.asdict(settings),
        "given": [
            {"as": name.removeprefix("--"), "file": str(path), "sha256": hashes[name]}
            for name, path in request.files.items()
        ],
        **more,
    }  # fmt: skip
