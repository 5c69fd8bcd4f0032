"""`megasora sample RUN --script FILE --out FILM.mp4`: shots one after the other, each with its own caption.

    {"prompt": "a red circle moves right", "seconds": 2}
    {"prompt": "a red circle moves down", "frames": 24}
    {"prompt": "a blue square moves left", "frames": 24, "cut": true}

A shot goes on from the last frames of the shot before, which are given to it; after a cut it begins anew. The film is
written shot by shot; the latents of finished shots are kept until it is complete.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megasora.config import Config
from megasora.errors import DONE, MegaSoraError, printable
from megasora.sampling import timeline as kinds
from megasora.sampling.clip_plan import ClipPlan
from megasora.sampling.outputs import beside, check_kind_of_output, check_output_path, marked, write_result
from megasora.sampling.progress import shown_progress
from megasora.sampling.prompt_batch import Line, OpenSession, checked, read_lines
from megasora.sampling.requests import MAX_SEED, Length, Request, parse_flag
from megasora.sampling.sample_settings import run_settings
from megasora.sampling.seams import Steps
from megasora.sampling.timeline import Timeline

if TYPE_CHECKING:
    from megasora.sampling.session import Session
    from megasora.sampling.window_sampling import Progress
    from megasora.sampling.work_folder import WorkFolder

KEYS = ("prompt", "negative_prompt", "frames", "seconds", "seed", "cut")
SHEET_FRAMES = 8  # of each shot


@dataclass(frozen=True)
class Shot:
    """`plan`: the clip of its new frames. `cut`: nothing is given to it."""

    line: Line
    plan: ClipPlan
    cut: bool


def sample_script(options: argparse.Namespace, open_session: OpenSession) -> int:
    """Samples the shots of `options.script` into the film `options.out`; the exit code. Raises MegaSoraError."""
    check_output_path(options.out)
    if options.script.suffix != ".jsonl":
        raise MegaSoraError(f"--script {options.script} must end in .jsonl, one object a line")
    lines = read_lines(options.script, "--script")
    config = run_settings(options.run, options.overrides, vars(options))
    defaults = {name: getattr(options, name) for name in ("negative_prompt", "size", "frames", "fps")}
    shots = checked(lines, lambda line: shot_of(line, defaults, options.seed or 0, config, line is lines[0]))
    check_kind_of_output(options.out, sum(shot.plan.new_frames for shot in shots))
    with open_session(config) as session:
        session.check_one_group()
        film = Film(session, shots, options.out)
        checked(shots, film.check)
        with shown_progress(f"{len(shots)} shots", session.is_writer) as progress:
            film.make(progress)
        if session.is_writer:
            print(f"{options.out}  (contact sheet: {beside(options.out)[0]})")
    return DONE


def shot_of(line: Line, defaults: dict[str, Any], seed: int, config: Config, is_first: bool) -> Shot:
    """The shot of a line. `defaults`: of flags, for values that it does not have. Raises MegaSoraError."""
    values = dict(line.values)
    unknown = [key for key in values if key not in KEYS]
    if unknown:
        raise MegaSoraError(f"unknown key '{printable(str(unknown[0]), 60)}'; known keys: {', '.join(KEYS)}")
    cut = parse_flag(values.pop("cut", False), "cut") or is_first
    seconds = values.pop("seconds", None)
    if seconds is not None and "frames" in values:
        raise MegaSoraError("frames and seconds exclude each other")
    given = {"seed": (seed + line.number - 1) % MAX_SEED, **{k: v for k, v in defaults.items() if v is not None}}
    request = Request.from_values({**given, **values})
    if seconds is not None:
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise MegaSoraError(f"seconds {printable(json.dumps(seconds), 60)} is not a number, e.g. 2")
        length = Length.parse(f"{seconds}s", "seconds")
        request = dataclasses.replace(request, frames=length.frames(request.fps or config.sample.fps))
        request.check()
    return Shot(line, ClipPlan.of(request, config), cut)


class Film:
    """The shots of a film."""

    def __init__(self, session: Session, shots: list[Shot], out: Path):
        self.session, self.shots, self.out = session, shots, out
        self.first_frames = [0, *accumulate(shot.plan.new_frames for shot in shots)]  # of each shot; the number of all
        self.steps = Steps()
        self.sheet: list[tuple[str, np.ndarray]] = []  # of each shot its prompt and a few frames

    def check(self, shot: Shot) -> None:
        """Raises MegaSoraError for a shot that the run cannot sample."""
        self.session.check(shot.plan, self.out)
        if not shot.cut:
            plan = shot.plan
            most = self.session.sampler.context_frames(self.session.settings)
            frames = np.broadcast_to(np.uint8(0), (min(most, self.first_frames[-1]), plan.height, plan.width, 3))
            self.session.check_timeline(self.timeline(shot, frames))

    def timeline(self, shot: Shot, before_FHWC: np.ndarray | None) -> Timeline:
        """The timeline of a shot after the given frames."""
        session, plan = self.session, shot.plan
        alone = plan.timeline(session.sampler, session.settings, session.caption(plan))
        if before_FHWC is None or shot.cut:
            return alone
        return kinds.extend(alone, session.sampler.context_before(before_FHWC, session.settings))

    def make(self, progress: Progress) -> None:
        from megasora.sampling.session import digest

        session, plan = self.session, self.shots[0].plan
        prints = [session.fingerprint(shot.plan, {}) | {"cut": shot.cut} for shot in self.shots]
        parts: dict[str, str] = {}
        for number, values in enumerate(prints):  # a shot depends on those before it, back to a cut
            before = [] if self.shots[number].cut else list(parts.values())[-1:]
            parts[part_name(number)] = digest([values, *before])
        with session.work_folder(self.out, {"script": True}, parts) as work:
            frames = self.frames(work, progress)
            if session.is_writer:
                prompts = " / ".join(shot.plan.request.prompt for shot in self.shots)
                comment = session.sampler.provenance(prompts, plan.request.seed)
                size = (plan.height, plan.width)
                write_result(
                    self.out, frames, size, plan.fps, comment, lambda: self.sheet, lambda: self.record(comment)
                )
            else:
                for _ in frames:
                    pass
            session.barrier()  # the others have read what is removed now
            if session.is_writer:
                work.clear(session.keep_latents)

    def frames(self, work: WorkFolder, progress: Progress) -> Iterator[np.ndarray]:
        """Samples shot by shot; yields the frames of each."""
        session = self.session
        most = session.sampler.context_frames(session.settings)
        before: np.ndarray | None = None  # the last frames since a cut
        for number, shot in enumerate(self.shots):
            timeline = self.timeline(shot, before)
            part = work.of_part(part_name(number))
            store = part.store(timeline)
            step = lambda fraction, n=number: progress((n + fraction) / len(self.shots))  # noqa: E731
            session.sample([timeline], [store], [part], step)
            new_FHWC = store.frames_FHWC[timeline.frames - shot.plan.new_frames :]
            kept = np.linspace(0, len(new_FHWC) - 1, min(SHEET_FRAMES, len(new_FHWC))).round().astype(int)
            self.sheet.append((shot.plan.request.prompt, np.array(new_FHWC[kept])))
            for sampled in new_FHWC:
                frame = marked(sampled) if session.settings.watermark else sampled
                self.steps.add(frame)
                yield frame
            tail = new_FHWC if before is None or shot.cut else np.concatenate([before, new_FHWC[-most:]])
            before = np.array(tail[-most:])

    def record(self, comment: str) -> dict[str, Any]:
        """What the sidecar says."""
        session, plan = self.session, self.shots[0].plan
        return {
            **json.loads(comment), "kind": "script", "size": f"{plan.height}x{plan.width}",
            "frames": self.first_frames[-1], "fps": plan.fps,
            "shots": [
                {
                    **shot.plan.request.values(), "caption": session.caption(shot.plan), "first_frame": first,
                    "frames": shot.plan.new_frames, "cut": shot.cut,
                }
                for shot, first in zip(self.shots, self.first_frames, strict=False)
            ],
            "settings": dataclasses.asdict(session.settings), "checkpoint": session.checkpoint,
            "measured": {"seams": self.steps.seams(self.first_frames[1:-1])},
        }  # fmt: skip


def part_name(shot: int) -> str:
    return f"shot-{shot:04d}-"
