"""WindowSampling: samples the windows of clips, those of several clips in one pack.

Job --store--> WindowFrames --codec--> WindowLatents --> ClipPrompt --generate--> patches --codec--> frames --> store
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from megasora.build import patch_dim
from megasora.config import Config, SampleConfig
from megasora.data.pack import Record
from megasora.sampling.denoiser import Denoiser
from megasora.sampling.frame_store import FrameStore
from megasora.sampling.generate import ClipPrompt, generate, num_evaluations
from megasora.sampling.latents import (
    ClipCoder,
    WindowFrames,
    WindowLatents,
    first_pass,
    needs_second_pass,
    restore_given,
    second_pass,
)
from megasora.sampling.rope import scaled_rope
from megasora.sampling.timeline import Timeline
from megasora.sampling.windows import Window

Progress = Callable[[float], None]  # called with the fraction that is done


class LatentStore(Protocol):
    """Keeps sampled latents, so that sampling that was interrupted goes on after them."""

    def get(self, timeline: int, window: int, sampling_pass: int) -> Tensor | None: ...

    def put(self, timeline: int, window: int, sampling_pass: int, patches_LP: Tensor) -> None: ...


@dataclass
class Job:
    """One window of one timeline."""

    index: int  # of the timeline
    timeline: Timeline
    store: FrameStore
    number: int  # of the window
    window: Window
    frames: WindowFrames | None = None
    sampled_FHWC: np.ndarray | None = None


class WindowSampling:
    """`encode`: a caption to its features [S, E]. `trained_grid`: the largest grid of the training clips, needed if
    sample.rope is set. `latents`: keeps what was sampled before it is decoded."""

    def __init__(
        self,
        config: Config,
        sample: SampleConfig,
        denoiser: Denoiser,
        coder: ClipCoder,
        encode: Callable[[str], Tensor],
        trained_grid: tuple[int, int, int] | None = None,
        latents: LatentStore | None = None,
    ):
        self.config, self.sample, self.denoiser, self.coder, self.encode = config, sample, denoiser, coder, encode
        self.trained_grid, self.latents = trained_grid, latents

    def run(self, rounds: list[list[Job]], progress: Progress) -> None:
        """Samples the windows of each round, which are of different clips, before those of the next."""
        batches = [batch for jobs in rounds for batch in self.batches(jobs)]
        for number, batch in enumerate(batches):
            self.sample_windows(batch, lambda f, n=number: progress((n + f) / len(batches)))

    def batches(self, jobs: list[Job]) -> list[list[Job]]:
        """Divides windows into packs of at most data.tokens_per_pack tokens, or of one window."""
        batches, tokens = [], 0
        for job in jobs:
            t, h, w = self.coder.grid(job.window.frames, job.timeline.height, job.timeline.width)
            if not batches or tokens + t * h * w > self.config.data.tokens_per_pack:
                batches.append([])
                tokens = 0
            batches[-1].append(job)
            tokens += t * h * w
        return batches

    def sample_windows(self, jobs: list[Job], progress: Progress) -> None:
        """Samples windows in one pack, decodes them and puts their frames into the stores."""
        for job in jobs:
            job.frames = job.store.window(job.window)
        again = [job for job in jobs if self.sample.refine > 0 and needs_second_pass(job.frames)]
        share = 1 / (1 + self.sample.refine) if again else 1.0
        first = [first_pass(job.frames, self.coder, patch_dim(self.config)) for job in jobs]
        self.run_pass(jobs, first, 0, lambda f: progress(share * f))
        if again:
            second = [second_pass(job.frames, job.sampled_FHWC, self.coder, self.sample.refine) for job in again]
            self.run_pass(again, second, 1, lambda f: progress(share + (1 - share) * f))
        for job in jobs:
            job.store.complete(job.window, restore_given(job.frames, job.sampled_FHWC, self.coder))
            job.frames = job.sampled_FHWC = None

    def run_pass(
        self,
        jobs: list[Job],
        windows: list[WindowLatents],
        number: int,
        progress: Progress,
    ) -> None:
        """Sets `sampled_FHWC` of the jobs."""
        sampled = [self.latents.get(job.index, job.number, number) if self.latents else None for job in jobs]
        missing = [i for i, patches in enumerate(sampled) if patches is None]
        if missing:
            prompts = [self.clip_prompt(jobs[i], windows[i]) for i in missing]
            total, done = max(1, num_evaluations(prompts, self.config.objective, self.sample)), iter(range(1, 10**9))
            largest = tuple(max(sizes) for sizes in zip(*(p.record.grid for p in prompts), strict=True))
            with scaled_rope(self.denoiser.stages, self.sample.rope, self.trained_grid, largest):
                patches = generate(
                    self.denoiser, prompts, self.config.objective, self.sample, self.denoiser.device,
                    self.denoiser.pad_tokens, lambda: progress(next(done) / total),
                )  # fmt: skip
            for i, patches_LP in zip(missing, patches, strict=True):
                sampled[i] = patches_LP
                if self.latents is not None:
                    self.latents.put(jobs[i].index, jobs[i].number, number, patches_LP)
        for job, window, patches_LP in zip(jobs, windows, sampled, strict=True):
            decoded = self.coder.decode(patches_LP, window.grid, (job.timeline.height, job.timeline.width))
            job.sampled_FHWC = decoded[: job.window.frames]

    def clip_prompt(self, job: Job, window: WindowLatents) -> ClipPrompt:
        timeline = job.timeline
        frames = job.window.frames
        native = (timeline.height, timeline.width, frames, timeline.fps if frames > 1 else 0.0)
        text = self.encode(timeline.prompt)
        record = Record(timeline.sample_id, window.patches_LP, window.grid, text, native, timeline.prompt)
        negative = timeline.negative_prompt
        if negative is None and self.sample.unconditional == "negative_prompt":
            negative = self.sample.negative_prompt
        negative_SE = None if negative is None else self.encode(negative)
        return ClipPrompt(record, window.start_T, window.held_L, negative_SE, timeline.seed, job.number)
