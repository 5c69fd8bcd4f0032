"""The form of the page: its fields, and the request and the settings that they say."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasora.config import SampleConfig
from megasora.config.validate import check_bounds
from megasora.errors import MegaSoraError, describe
from megasora.sampling.requests import Request

EXTEND, PREPEND, LOOP, EDIT = "extend", "prepend", "loop", "edit"
USES = {  # of the given video: label on the page -> key of a request
    "go on after it": EXTEND,
    "lead to it": PREPEND,
    "make it a loop": LOOP,
    "change it": EDIT,
}
LABELS = {  # key of a request, or of the settings -> name of the field
    "prompt": "Prompt", "negative_prompt": "Negative prompt", "image": "First frame", "last_image": "Last frame",
    "video": "Video", "edit": "Strength", "extend": "Frames", "prepend": "Frames", "size": "Size", "frames": "Frames",
    "fps": "Frames per second", "seed": "Seed", "num_inference_steps": "Steps", "guidance_scale": "Guidance",
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """What is in the fields. Files are paths of uploaded copies; None is an empty field."""

    prompt: str
    negative_prompt: str | None
    image: str | None
    last_image: str | None
    video: str | None
    use: str  # a label of USES, of `video`
    strength: float
    size: str | None  # HEIGHTxWIDTH
    frames: int | None  # new ones
    fps: float | None
    seed: int | None
    guidance_scale: float | None
    num_inference_steps: int | None

    def request(self) -> Request:
        """Raises MegaSoraError with the keys of a request as flags."""
        values: dict[str, Any] = {
            "prompt": self.prompt or "", "negative_prompt": self.negative_prompt or None, "image": self.image,
            "last_image": self.last_image, "video": self.video, "size": (self.size or "").strip() or None,
            "frames": self.frames, "fps": self.fps, "seed": self.seed,
        }  # fmt: skip
        if self.video:
            values["fps"] = None  # that of the video
            use = USES.get(self.use)
            if use is None:
                raise MegaSoraError("--video: choose what to do with it")
            if use == LOOP:
                values["loop"] = True
            else:  # say themselves how many frames are new
                values["frames"] = None
                values[use] = self.strength if use == EDIT else self.frames
            if use in (EXTEND, PREPEND) and self.frames is None:
                raise MegaSoraError("--frames: say how many frames are new")
        return Request.from_values(values)

    def settings(self, sample: SampleConfig) -> SampleConfig:
        """The settings of the run with those of the form. Raises MegaSoraError for values out of bounds."""
        own = {"guidance_scale": self.guidance_scale, "num_inference_steps": self.num_inference_steps}
        settings = dataclasses.replace(sample, **{key: value for key, value in own.items() if value is not None})
        check_bounds(settings, "sample.")
        return settings

    def message(self, error: Exception) -> str:
        """What an error says to a person who sees the page: fields by their names, given files without their folder."""
        text = describe(error)
        for path in filter(None, (self.image, self.last_image, self.video)):
            text = text.replace(path, Path(path).name)
        for key, label in sorted(LABELS.items(), key=lambda item: -len(item[0])):
            text = re.sub(rf"--{key.replace('_', '-')}(?![\w-])|\bsample\.{key}\b", label, text)
        return text[:1].upper() + text[1:]
