"""Session: an open run and the settings of a command; `sample_clips` makes files of clips with it.

ClipPlan --decode--> Timeline --Sampler, latents saved--> frames --write--> OUT.mp4, OUT.sheet.png, OUT.json
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megasora.checkpoint.manifest import read_manifest
from megasora.config import SampleConfig
from megasora.errors import MegaSoraError
from megasora.sampling.abilities import check_abilities, check_windows
from megasora.sampling.clip_plan import ClipPlan
from megasora.sampling.frame_store import FrameStore
from megasora.sampling.outputs import record_of, write_clip
from megasora.sampling.prompt_expansion import Expander
from megasora.sampling.run_to_sample import RunToSample
from megasora.sampling.sampler import Sampler
from megasora.sampling.timeline import Timeline
from megasora.sampling.window_sampling import Progress
from megasora.sampling.work_folder import SavedLatents, WorkFolder, check_space, folder_of, num_bytes

if TYPE_CHECKING:
    from torch import Tensor

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # every further clip fails in the same way


@dataclass(frozen=True)
class Session:
    """`is_writer`: whether this process writes files; it is one of the ranks that share packs. `barrier`: of these.
    `is_shared`: whether there are others.

    `data_rank` of `data_size`: which of the clips of a batch are sampled here.
    """

    sampler: Sampler
    settings: SampleConfig
    checkpoint: dict[str, Any]  # which one, for records
    expand: Expander = lambda prompt, seed: prompt
    keep_latents: bool = False
    is_writer: bool = True
    is_shared: bool = False
    rank: int = 0
    data_rank: int = 0
    data_size: int = 1
    barrier: Callable[[], None] = lambda: None

    def caption(self, plan: ClipPlan) -> str:
        """The text that the model gets for a prompt."""
        return self.expand(plan.request.prompt, plan.request.seed)

    def check(self, plan: ClipPlan, out: Path) -> None:
        """Raises MegaSoraError for a clip that this run cannot sample, or that does not fit on the disk."""
        sampler, caption = self.sampler, self.caption(plan)
        frame = (plan.height, plan.width, 3)
        what = f"{plan.new_frames} frames of {plan.height}x{plan.width}"
        check_space(out.parent, num_bytes((plan.new_frames, *frame)), what)
        for name, text in (("--prompt", caption), ("--negative-prompt", plan.request.negative_prompt)):
            if error := error_of_text(sampler.encode, text or ""):
                raise MegaSoraError(f"{name}: {error}") from None
        self.check_timeline(plan.outline(sampler, self.settings, caption))

    def check_one_group(self) -> None:
        """Raises MegaSoraError if there are processes for several packs, but one clip."""
        if self.data_size > 1:
            raise MegaSoraError(
                f"one clip is sampled by one group of processes, but the layout has {self.data_size}; raise "
                "parallel.context, parallel.tensor or parallel.pipeline, start fewer processes, or give --prompts"
            )

    def check_timeline(self, timeline: Timeline) -> None:
        """Raises MegaSoraError for given frames, or a length, that this run was not trained for."""
        trained = self.sampler.config.objective.frame_conditioning
        check_abilities(timeline, trained)
        if len(self.windows(timeline)) > 1:
            check_windows(timeline, self.sampler.window_frames(self.settings, timeline.frames), trained)

    def windows(self, timeline: Timeline) -> list[tuple[int, int]]:
        """(first, end) of each window of a timeline."""
        return [(window.first, window.end) for window in self.sampler.windows(timeline, self.settings)]

    def pack_key(self, plan: ClipPlan) -> tuple[Any, int]:
        """What clips must have in common to be sampled in one pack, and the tokens of the first window of this one."""
        timeline = plan.outline(self.sampler, self.settings, self.caption(plan))
        first, end = self.windows(timeline)[0]
        grid = self.sampler.coder.grid(end - first, plan.height, plan.width)
        level = plan.request.edit or 1.0  # solver steps are in proportion
        return (level, None if self.settings.rope == "none" else grid), grid[0] * grid[1] * grid[2]

    def fingerprint(self, plan: ClipPlan, hashes: dict[str, str]) -> dict[str, Any]:
        """What the latents of a clip depend on."""
        return json.loads(json.dumps({
            "request": plan.request.values(), "files": hashes, "caption": self.caption(plan),
            "settings": dataclasses.asdict(self.settings), "checkpoint": self.checkpoint,
            "codec": self.sampler.codec.fingerprint,
            "clip": [plan.height, plan.width, plan.new_frames, plan.fps],
        }))  # fmt: skip

    @contextmanager
    def work_folder(
        self, out: Path, fingerprint: dict[str, Any], parts: dict[str, str] | None = None
    ) -> Iterator[WorkFolder]:
        """The work folder of `out`: one process makes it, then all use it."""
        with ExitStack() as stack:
            if self.is_writer:
                stack.enter_context(WorkFolder.open(out, fingerprint, parts))
            self.barrier()
            yield WorkFolder(folder_of(out), self.rank)

    def sample(
        self,
        timelines: Sequence[Timeline],
        stores: Sequence[FrameStore],
        works: Sequence[WorkFolder],
        progress: Progress,
    ) -> None:
        """Fills the stores; the latents are saved in the work folders. Raises MegaSoraError, also for too little memory
        of a process that shares no packs."""
        latents = SavedLatents(works, self.is_writer)
        try:
            self.sampler.sample(timelines, self.settings, progress, stores, latents)
        except (MemoryError, RuntimeError) as error:
            if self.is_shared or not is_out_of_memory(error):
                raise
            longest = max(timelines, key=lambda timeline: timeline.frames)
            frames = min(longest.frames, self.sampler.window_frames(self.settings, longest.frames))
            raise MegaSoraError(
                f"too little memory to sample {frames} frames of {longest.height}x{longest.width} at once; lower "
                "sample.window_frames or --size, or use several processes"
            ) from None


def is_out_of_memory(error: Exception) -> bool:
    """Whether there is too little memory, of this machine or of its GPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


def error_of_text(encode: Callable[[str], Tensor], text: str) -> MegaSoraError | None:
    """Why the text encoder does not take a text: it is too long."""
    try:
        encode(text)
    except MegaSoraError as error:
        return error
    return None


def checkpoint_of(run: RunToSample) -> dict[str, Any]:
    """What names a checkpoint: the run, its step, the kind of weights, and the hash of its manifest."""
    manifest = read_manifest(run.checkpoint.folder.parent)
    return {"run": run.name, "step": run.step, "weights": run.weights, "digest": manifest.digest}


@dataclass
class ClipJob:
    """A clip that is being made."""

    plan: ClipPlan
    out: Path
    hashes: dict[str, str]
    error: Exception | None = None
    work: WorkFolder | None = None
    timeline: Timeline | None = None
    store: FrameStore | None = None

    @property
    def is_ready(self) -> bool:
        return self.error is None and self.store is not None


def digest(values: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def hashes_of(plan: ClipPlan) -> dict[str, str]:
    """SHA-256 of the given files, by what names them."""
    from megasora.data.media import Media, sha256

    return {name: sha256(Media(path)) for name, path in plan.request.files.items()}


def sample_clip(session: Session, plan: ClipPlan, out: Path, progress: Progress = lambda fraction: None) -> None:
    """Makes one file. Raises MegaSoraError or OSError."""
    (error,) = sample_clips(session, [(plan, out)], progress)
    if error is not None:
        raise error


def sample_clips(
    session: Session, clips: Sequence[tuple[ClipPlan, Path]], progress: Progress = lambda fraction: None
) -> list[Exception | None]:
    """Makes the files of several clips, which are sampled in the same packs; of each the error that prevented it.

    Raises OSError where there is no space for any further file; what was sampled is kept in work folders.
    """
    with ExitStack() as stack:
        jobs = [ClipJob(plan, out, {}) for plan, out in clips]
        for job in jobs:
            prepare(session, job, stack)
        ready = [job for job in jobs if job.is_ready]
        try:
            sample_jobs(session, ready, progress)
        except MegaSoraError as error:
            if len(ready) == 1:
                ready[0].error = error
            else:  # of one of them
                for job in ready:
                    with recorded(job):
                        job.store = job.work.store(job.timeline)
                        sample_jobs(session, [job], lambda fraction: None)
        for job in ready:
            if session.is_writer and job.error is None:
                with recorded(job):
                    write_job(session, job)
            session.barrier()  # the others have read what is removed now
            if session.is_writer and job.error is None:
                job.work.clear(session.keep_latents)
    return [job.error for job in jobs]


def prepare(session: Session, job: ClipJob, stack: ExitStack) -> None:
    """Opens the work folder of a clip and decodes its given frames; errors are recorded.

    Except one of the work folder where processes share it: only the first knows of it, and the others would wait.
    """
    with recorded(job):
        job.hashes = hashes_of(job.plan)
    if job.error is None:
        with nullcontext() if session.is_shared else recorded(job):
            job.work = stack.enter_context(session.work_folder(job.out, session.fingerprint(job.plan, job.hashes)))
    if job.error is None:
        with recorded(job):
            caption = session.caption(job.plan)
            job.timeline = job.plan.timeline(session.sampler, session.settings, caption, job.work.allocate)
            job.store = job.work.store(job.timeline)


def sample_jobs(session: Session, jobs: list[ClipJob], progress: Progress) -> None:
    if jobs:
        timelines, stores = [job.timeline for job in jobs], [job.store for job in jobs]
        session.sample(timelines, stores, [job.work for job in jobs], progress)


def write_job(session: Session, job: ClipJob) -> None:
    plan, sampler = job.plan, session.sampler
    comment = sampler.provenance(plan.request.prompt, plan.request.seed)
    record = record_of(
        plan, comment, session.settings, job.hashes, caption=session.caption(plan), checkpoint=session.checkpoint,
        windows=session.windows(job.timeline), fingerprint=digest(session.fingerprint(plan, job.hashes)),
    )  # fmt: skip
    write_clip(plan, job.timeline, job.store.frames_FHWC, job.out, comment, record, session.settings.watermark)


@contextmanager
def recorded(job: ClipJob) -> Iterator[None]:
    """An error of one clip becomes its `error`, unless every further clip would fail in the same way."""
    try:
        yield
    except MegaSoraError as error:
        job.error = error
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        job.error = error
