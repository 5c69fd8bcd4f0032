"""Sampler: videos of a trained run, from every kind of prompt.

    Sampler.from_run("runs/demo").video("a red circle moves right", size=(32, 48), frames=17)

    timelines --windows--> WindowFrames --codec--> ClipPrompt --generate--> patches --codec--> frames --> next window

Windows of several timelines are sampled in the same packs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megasora.codec import build_codec
from megasora.config import Config, SampleConfig, parse_size
from megasora.config.validate import check_bounds, validate_sample
from megasora.errors import MegaSoraError
from megasora.sampling import timeline as timelines_of
from megasora.sampling.abilities import check_abilities, check_clip, check_windows
from megasora.sampling.denoiser import Denoiser, LocalDenoiser
from megasora.sampling.frame_store import FrameStore
from megasora.sampling.latents import ClipCoder
from megasora.sampling.provenance import provenance_comment
from megasora.sampling.run_to_sample import RunToSample, TrainedOn, check_codec
from megasora.sampling.timeline import Timeline
from megasora.sampling.window_sampling import Job, LatentStore, Progress, WindowSampling
from megasora.sampling.windows import Window, plan_windows, whole
from megasora.text import build_text_encoder

if TYPE_CHECKING:
    from megasora.codec import Codec
    from megasora.text import TextEncoder

UNKNOWN = TrainedOn()
MAX_ENCODED = 32  # captions whose features are kept: a clip needs them in each window


class Call:
    """What the methods of `Sampler` have in common: a clip to sample, and the settings and progress of a call."""

    def __init__(
        self, sampler: Sampler, options: dict[str, Any], prompt: str, size: tuple[int, int] | None, frames: int | None
    ):
        if frames is not None and frames < 1:
            raise MegaSoraError(f"frames={frames} must be at least 1")
        options = dict(options)
        self.sampler, self.progress = sampler, options.pop("progress", lambda fraction: None)
        of_clip = {key: options.pop(key) for key in ("fps", "seed", "negative_prompt") if key in options}
        self.timeline, self.settings = (
            sampler.timeline(prompt, size, frames, **of_clip),
            sampler.override_settings(**options),
        )

    def sample(self, timeline: Timeline) -> np.ndarray:
        return self.sampler.sample([timeline], self.settings, self.progress)[0].frames_FHWC


class Sampler:
    """`run` and `step` name the checkpoint."""

    def __init__(
        self,
        config: Config,
        denoiser: Denoiser,
        run: str,
        step: int,
        trained_on: TrainedOn = UNKNOWN,
        codec: Codec | None = None,
        encoder: TextEncoder | None = None,
    ):
        self.config, self.denoiser, self.run, self.step = config, denoiser, run, step
        self.trained_on = trained_on
        self.codec = build_codec(config.codec) if codec is None else codec
        self.encoder = build_text_encoder(config.text) if encoder is None else encoder
        self.encode = lru_cache(MAX_ENCODED)(
            lambda text: self.encoder.encode([text])[0]
        )  # features [S, E] of a caption
        self.coder = ClipCoder(self.codec, tuple(config.data.patch))

    @classmethod
    def from_run(cls, run: str | Path, weights: str = "ema", device: str = "auto") -> Sampler:
        """The newest checkpoint of a run folder. `weights`: ema or raw. Raises MegaSoraError if there is none."""
        opened = RunToSample.open(Path(run), weights)
        return cls.of(opened, LocalDenoiser(opened.build_model(), device))

    @classmethod
    def of(cls, run: RunToSample, denoiser: Denoiser) -> Sampler:
        """For a model that was built of `run`, on any layout."""
        sampler = cls(run.config, denoiser, run.name, run.step, run.trained_on())
        check_codec(run.folder, run.config, sampler.codec.fingerprint)
        return sampler

    # ------------------------------------------------------------------ kinds of prompts
    #
    # `options` of each: fps, seed, negative_prompt, progress, and settings of the section `sample`. Videos and results
    # are uint8 [F, H, W, 3], images uint8 [H, W, 3]. Each raises MegaSoraError for what this run cannot sample.

    def video(
        self,
        prompt: str,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        image: np.ndarray | None = None,
        last_image: np.ndarray | None = None,
        **options,
    ) -> np.ndarray:
        """A clip of `size` (height, width), by default that of the images. They are its first and its last frame."""
        frames = self.config.sample.frames if frames is None else frames
        images = {0: image, frames - 1: last_image}
        return self.keyframes(prompt, {i: x for i, x in images.items() if x is not None}, size, frames, **options)

    def keyframes(
        self,
        prompt: str,
        images: dict[int, np.ndarray],
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        **options,
    ) -> np.ndarray:
        """As `video`. `images`: by frame number, from 0."""
        if size is None and images:
            index, image = next(iter(images.items()))
            size = timelines_of.as_frames(image, f"the image of frame {index}", 3).shape[:2]
        call = Call(self, options, prompt, size, frames)
        return call.sample(timelines_of.keyframes(call.timeline, images))

    def extend(self, video: np.ndarray, prompt: str, frames: int, **options) -> np.ndarray:
        """`video`, and `frames` new frames after it."""
        call = self.call_with(video, options, prompt, frames)
        context = self.context_before(video, call.settings)
        return np.concatenate([video, call.sample(timelines_of.extend(call.timeline, context))[len(context) :]])

    def prepend(self, video: np.ndarray, prompt: str, frames: int, **options) -> np.ndarray:
        """`frames` new frames, and `video` after them."""
        call = self.call_with(video, options, prompt, frames)
        context = self.context_after(video, call.settings)
        return np.concatenate([call.sample(timelines_of.prepend(call.timeline, context))[:frames], video])

    def connect(self, before: np.ndarray, after: np.ndarray, prompt: str, frames: int, **options) -> np.ndarray:
        """The video `before`, `frames` new frames, and the video `after`."""
        return np.concatenate([before, self.between(before, after, prompt, frames, options), after])

    def loop(self, video: np.ndarray, prompt: str, frames: int, **options) -> np.ndarray:
        """`video`, and `frames` new frames that lead from its end back to its start."""
        return np.concatenate([video, self.between(video, video, prompt, frames, options)])

    def edit(
        self, video: np.ndarray, prompt: str, strength: float, mask: np.ndarray | None = None, **options
    ) -> np.ndarray:
        """`video` with another caption. `strength` in (0, 1]: the level that sampling starts from. `mask`: bool
        [F, H, W], True where pixels may change."""
        call = self.call_with(video, options, prompt)
        return call.sample(timelines_of.edit(call.timeline, video, strength, mask))

    def between(
        self, before: np.ndarray, after: np.ndarray, prompt: str, frames: int, options: dict[str, Any]
    ) -> np.ndarray:
        call = self.call_with(before, options, prompt, frames)
        timelines_of.as_frames(after, "the video after", 4)
        head = self.context_before(before, call.settings)
        tail = self.context_after(after, call.settings, gap=frames)
        return call.sample(timelines_of.connect(call.timeline, head, tail))[len(head) : len(head) + frames]

    def call_with(self, video: np.ndarray, options: dict[str, Any], prompt: str, frames: int | None = None) -> Call:
        """A call for clips of the size of a video; `frames`: None: as many."""
        height, width = timelines_of.as_frames(video, "the video", 4).shape[1:3]
        return Call(self, options, prompt, (height, width), len(video) if frames is None else frames)

    def timeline(
        self,
        prompt: str,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        fps: float | None = None,
        seed: int = 0,
        negative_prompt: str | None = None,
        sample_id: int = 0,
    ) -> Timeline:
        """A clip of which only the caption is given; None: as `sample.*` says."""
        sample = self.config.sample
        height, width = size or parse_size(sample.size, "sample.size")
        return Timeline(
            prompt, height, width, sample.frames if frames is None else frames, sample.fps if fps is None else fps,
            negative_prompt=negative_prompt, seed=seed, sample_id=sample_id,
        )  # fmt: skip

    def override_settings(self, **changes) -> SampleConfig:
        """The run's `sample` section with these changes; None leaves a setting as it is. Raises MegaSoraError."""
        known = [field.name for field in dataclasses.fields(SampleConfig)]
        unknown = [name for name in changes if name not in known]
        if unknown:
            raise MegaSoraError(f"{unknown[0]} is no setting of the section sample; known: {', '.join(known)}")
        sample = dataclasses.replace(self.config.sample, **{k: v for k, v in changes.items() if v is not None})
        check_bounds(sample, "sample.")
        validate_sample(sample)
        return sample

    # ------------------------------------------------------------------ lengths

    def window_frames(self, sample: SampleConfig, frames: int) -> int:
        """Frames of a window of a clip of `frames` frames: all of it, if the longest training clip is not known."""
        return whole(sample.window_frames or self.trained_on.frames or frames + self.coder.ft, self.coder.ft)

    def context_frames(self, sample: SampleConfig) -> int:
        """Frames of a window that are given by those before it; 1 if the run was not trained with more."""
        weights = self.config.objective.frame_conditioning
        if weights.head == 0 and weights.both == 0:
            return 1
        return sample.context_frames or max(1, self.window_frames(sample, sample.frames) // 3)

    def context_before(self, video: np.ndarray, sample: SampleConfig) -> np.ndarray:
        """The last frames of a video, as many as are given to its continuation: 1 + k ft."""
        return video[-whole(min(self.context_frames(sample), len(video)), self.coder.ft) :]

    def context_after(self, video: np.ndarray, sample: SampleConfig, gap: int = 0) -> np.ndarray:
        """The first frames of a video that are given to what comes before: k ft, and what fills the last group of
        `gap` new frames."""
        ft, weights = self.coder.ft, self.config.objective.frame_conditioning
        groups = 1 if weights.tail == 0 and weights.both == 0 else max(1, self.context_frames(sample) // ft)
        return video[: -gap % ft + ft * groups]

    # ------------------------------------------------------------------ sampling

    def sample(
        self,
        timelines: Sequence[Timeline],
        sample: SampleConfig,
        progress: Progress = lambda fraction: None,
        stores: Sequence[FrameStore] | None = None,
        latents: LatentStore | None = None,
    ) -> list[FrameStore]:
        """The frames of each timeline. `stores`: where they are kept, None: in memory. `latents`: keeps the latents of
        each window before it is decoded. Raises MegaSoraError for what this run cannot sample, before it begins."""
        for timeline in timelines:
            check_clip(timeline)
            check_abilities(timeline, self.config.objective.frame_conditioning)
            self.encode(timeline.prompt)  # raises for a caption that is too long
        if sample.rope != "none" and self.trained_on.grid is None:
            raise MegaSoraError(
                f"sample.rope={sample.rope} needs the largest grid of the training clips, which run.json of {self.run} "
                "does not have, as that of an older run or an import; train it further, or leave sample.rope out"
            )
        stores = [FrameStore(timeline) for timeline in timelines] if stores is None else stores
        rounds = self.plan(timelines, stores, sample)
        for job in rounds[1] if len(rounds) > 1 else ():
            check_windows(
                job.timeline, self.window_frames(sample, job.timeline.frames), self.config.objective.frame_conditioning
            )
        sampling = WindowSampling(
            self.config, sample, self.denoiser, self.coder, self.encode, self.trained_on.grid, latents
        )
        sampling.run(rounds, progress)
        return list(stores)

    def plan(
        self, timelines: Sequence[Timeline], stores: Sequence[FrameStore], sample: SampleConfig
    ) -> list[list[Job]]:
        """The first windows of all timelines, then the second ones, and so on."""
        planned = [
            [
                Job(index, timeline, store, number, window)
                for number, window in enumerate(self.windows(timeline, sample))
            ]
            for index, (timeline, store) in enumerate(zip(timelines, stores, strict=True))
        ]
        return [[job for job in jobs if job is not None] for jobs in zip_longest(*planned)]

    def windows(self, timeline: Timeline, sample: SampleConfig) -> list[Window]:
        """The windows of a clip, in the order in which they are sampled."""
        longest, context = self.window_frames(sample, timeline.frames), self.context_frames(sample)
        return plan_windows(timeline.frames, longest, context, self.coder.ft, timeline.is_backward)

    def provenance(self, prompt: str, seed: int) -> str:
        """JSON text for the metadata of a file: that it is generated, and by which run."""
        return provenance_comment(self.run, self.step, prompt, seed)
