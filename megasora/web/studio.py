"""Studio: a run that is open for sampling, and the folder that its clips go to, as the page uses them.

    Form --request, settings--> ClipPlan --sample_clip--> OUT/0001.mp4, 0001.sheet.png, 0001.json --> Clip

The files are those of `megasora sample`. One clip is made at a time.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megasora.errors import MegaSoraError
from megasora.files import check_folder, read_regular_file
from megasora.jsonl import parse_json
from megasora.sampling.clip_plan import ClipPlan
from megasora.sampling.denoiser import LocalDenoiser
from megasora.sampling.outputs import beside, check_output
from megasora.sampling.prompt_expansion import Expander, build_expander
from megasora.sampling.run_to_sample import RunToSample
from megasora.sampling.sampler import Sampler
from megasora.sampling.session import Session, checkpoint_of, error_of_text, sample_clip
from megasora.sampling.work_folder import folder_of
from megasora.web.form import Form

MAX_SIDECAR_BYTES = 16 << 20
MAX_SHOWN = 60  # clips in the gallery, the newest


@dataclass(frozen=True)
class Clip:
    """A clip that was made. `values`: what its sidecar says."""

    file: Path
    values: dict[str, Any]

    @property
    def is_video(self) -> bool:
        return self.file.suffix == ".mp4"

    def text(self, key: str) -> str:
        return str(self.values.get(key) or "")


class Stopped(MegaSoraError):
    """A person pressed Stop."""


class Studio:
    """`out`: the folder of the clips. `template`: the expander of the run's captions; None if it has none."""

    def __init__(self, session: Session, out: Path, template: Expander | None = None):
        self.session, self.out, self.template = session, out, template
        self.stop, self.busy = threading.Event(), threading.Lock()

    @classmethod
    def open(cls, run: Path, out: Path | None = None, weights: str = "ema") -> Studio:
        """Loads the newest checkpoint of a run. `out`: None: RUN/web. Raises MegaSoraError."""
        opened = RunToSample.open(run, weights)
        out = run / "web" if out is None else out
        check_folder(out, f"--out {out}")
        sampler = Sampler.of(opened, LocalDenoiser(opened.build_model()))

        def fits(caption: str) -> bool:
            return error_of_text(sampler.encode, caption) is None

        def expander(setting: str) -> Expander:
            config = dataclasses.replace(
                opened.config, sample=dataclasses.replace(sampler.config.sample, expand=setting)
            )
            return cache(build_expander(config, run, fits))

        own = sampler.config.sample.expand
        try:
            template = expander("template" if own == "none" else own)
        except MegaSoraError:
            if own != "none":
                raise
            template = None
        out.mkdir(parents=True, exist_ok=True)
        return cls(Session(sampler, sampler.config.sample, checkpoint_of(opened)), out.resolve(), template)

    @property
    def name(self) -> str:
        """The run and its step."""
        return f"{self.session.sampler.run}, step {self.session.sampler.step:,}"

    def make(self, form: Form, is_expanded: bool, progress: Callable[[float], None] = lambda fraction: None) -> Clip:
        """Samples what a form says. Raises MegaSoraError or OSError for what cannot be made, and Stopped."""
        session = dataclasses.replace(self.session, settings=form.settings(self.session.settings))
        if is_expanded and self.template is not None:
            session = dataclasses.replace(session, expand=self.template)
        config = dataclasses.replace(session.sampler.config, sample=session.settings)
        plan = ClipPlan.of(form.request(), config)
        with self.busy:
            self.stop.clear()
            out = self.next_file(".png" if plan.num_frames == 1 else ".mp4")
            check_output(out, plan)
            session.check(plan, out)
            try:
                sample_clip(session, plan, out, lambda fraction: self.report(progress, fraction))
            except BaseException:
                shutil.rmtree(folder_of(out), ignore_errors=True)  # the next clip has another name
                raise
        return self.read(beside(out)[1])

    def report(self, progress: Callable[[float], None], fraction: float) -> None:
        if self.stop.is_set():
            raise Stopped("stopped; nothing was saved")
        progress(fraction)

    def next_file(self, suffix: str) -> Path:
        """The file of the next clip: its number follows the highest."""
        names = (re.match(r"\.?([0-9]{4,9})\.", path.name) for path in self.out.iterdir())
        return self.out / f"{max((int(name[1]) for name in names if name), default=0) + 1:04d}{suffix}"

    def made(self) -> list[Clip]:
        """The clips of the folder, the newest first."""
        numbered = [path for path in self.out.glob("*.json") if re.fullmatch("[0-9]{4,9}", path.stem)]
        newest = sorted(numbered, key=lambda path: int(path.stem), reverse=True)[:MAX_SHOWN]
        return [clip for path in newest if (clip := self.read(path)) is not None]

    def read(self, sidecar: Path) -> Clip | None:
        """The clip of a sidecar; None if one of both is missing or damaged."""
        try:
            values = parse_json(read_regular_file(sidecar, MAX_SIDECAR_BYTES))
        except (OSError, ValueError):
            return None
        files = [file for suffix in (".mp4", ".png") if (file := sidecar.with_suffix(suffix)).is_file()]
        return Clip(files[0], values) if files and isinstance(values, dict) else None
