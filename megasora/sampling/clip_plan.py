"""ClipPlan: a request with its files opened: what is sampled, and from which parts the result is put together.

    extend    video, new                  connect   video, new, other            edit, text, images   new
    prepend   new, video                  loop      video, new

The frames of a video are in the result as they are in its file; they are read one by one. Only those that the model is
given are kept in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megasora.config import Config, SampleConfig, parse_size
from megasora.data.clip_writer import MAX_FPS, MIN_FPS
from megasora.data.media_formats import IMAGE_FORMATS
from megasora.errors import MegaSoraError
from megasora.sampling import timeline as kinds
from megasora.sampling.inputs import Source, read_mask
from megasora.sampling.requests import Request
from megasora.sampling.timeline import Timeline

if TYPE_CHECKING:
    from megasora.sampling.sampler import Sampler

Allocate = Callable[[tuple[int, ...]], np.ndarray]  # shape -> uint8 array, in memory or in a file


@dataclass(frozen=True)
class Part:
    """Consecutive frames of the result: of a source, or the frames `first` to `end` - 1 of the timeline."""

    source: Source | None = None
    first: int = 0
    end: int = 0

    @property
    def num_frames(self) -> int:
        return self.source.num_frames if self.source else self.end - self.first


@dataclass(frozen=True)
class ClipPlan:
    """`new_frames`: frames that are sampled, without those of videos; of an edit all."""

    request: Request
    height: int
    width: int
    fps: float
    new_frames: int
    images: dict[int, Source]  # by frame
    video: Source | None = None
    other: Source | None = None  # the second video of --connect
    mask: Source | None = None

    @classmethod
    def of(cls, request: Request, config: Config, is_image: bool = False) -> ClipPlan:
        """Opens the files of a request. `is_image`: one frame, unless the request says otherwise.

        Raises MegaSoraError for files that cannot be read or do not fit each other or the request.
        """
        sample, limits = config.sample, config.ingest
        frames = request.frames or (1 if is_image else sample.frames)
        if request.keyframes and not request.frames:
            last = max(keyframe.index for keyframe in request.keyframes)
            frames = last + 1 if last > 0 else frames
        images = {
            index: Source.open(name, path, limits, IMAGE_FORMATS) for index, name, path in image_files(request, frames)
        }
        video, other = None, None
        if request.connect:
            video, other = (Source.open("--connect", path, limits) for path in request.connect)
            check_same(video, other)
        elif request.video:
            video = Source.open("--video", request.video, limits)
        mask = Source.open("--mask", request.mask, limits) if request.mask else None
        if mask is not None and video is not None:
            check_mask(mask, video)
        given = [*images.values(), *([video] if video else [])]
        height, width = size_of_clip(request, sample, given)
        largest = (limits.max_height, limits.max_width)
        if height > largest[0] or width > largest[1]:
            raise MegaSoraError(
                "--size {}x{} is larger than ingest.max_height={}, ingest.max_width={} of the run".format(
                    height, width, *largest
                )
            )
        fps = rate_of_clip(request, sample, video)
        for length in (request.extend, request.prepend):
            frames = length.frames(fps) if length else frames
        frames = video.num_frames if video and request.edit is not None else frames
        plan = cls(request, height, width, fps, frames, images, video, other, mask)
        if plan.num_frames > 1 and (height % 2 or width % 2):
            raise MegaSoraError(f"--size {height}x{width}: an H.264 video has an even height and width")
        return plan

    @property
    def parts(self) -> list[Part]:
        """What the result is put together from; frames of the timeline are counted from the first new one."""
        new = Part(first=0, end=self.new_frames)
        video = [Part(self.video)] if self.video and self.request.kind != "edit" else []
        other = [Part(self.other)] if self.other else []
        return [new, *video] if self.request.prepend else [*video, new, *other]

    @property
    def num_frames(self) -> int:
        """Frames of the result."""
        return sum(part.num_frames for part in self.parts)

    def timeline(
        self,
        sampler: Sampler,
        settings: SampleConfig,
        prompt: str,
        allocate: Allocate = lambda shape: np.empty(shape, np.uint8),
    ) -> Timeline:
        """Decodes the given frames. `prompt`: the caption, expanded. `allocate`: memory for a video to edit."""
        return self.build(sampler, settings, prompt, Reader(allocate))

    def outline(self, sampler: Sampler, settings: SampleConfig, prompt: str) -> Timeline:
        """The timeline with black frames that take no memory, for checks."""
        return self.build(sampler, settings, prompt, Outline())

    def build(self, sampler: Sampler, settings: SampleConfig, prompt: str, read: Reader) -> Timeline:
        request, gap = self.request, self.new_frames
        timeline = Timeline(
            prompt, self.height, self.width, gap, self.fps, negative_prompt=request.negative_prompt, seed=request.seed
        )
        if self.video is None:
            return kinds.keyframes(timeline, {i: read.first(image, 1)[0] for i, image in self.images.items()})
        if request.edit is not None:
            mask = read.mask(self.mask, gap) if self.mask else None
            return kinds.edit(timeline, read.all(self.video), request.edit, mask)
        before = lambda video: sampler.context_before(read.last(video, sampler.context_frames(settings)), settings)  # noqa: E731
        most = sampler.context_frames(settings) + 2 * sampler.coder.ft  # that context_after takes
        after = lambda video, gap: sampler.context_after(read.first(video, most), settings, gap)  # noqa: E731
        if request.extend:
            return kinds.extend(timeline, before(self.video))
        if request.prepend:
            return kinds.prepend(timeline, after(self.video, 0))
        return kinds.connect(timeline, before(self.video), after(self.other or self.video, gap))

    def first_new_frame(self, timeline: Timeline) -> int:
        """The frame of the timeline that is the first new one: after the context of a video before it."""
        starts_given = timeline.given and timeline.given[0].first == 0 and timeline.given[0].is_returned
        return timeline.given[0].end if starts_given else 0

    def result(self, timeline: Timeline, frames_FHWC: np.ndarray) -> Iterator[tuple[np.ndarray, int | None]]:
        """uint8 [H, W, 3] of each frame of the result, and its number in the timeline; None: it is of a given video.

        `frames_FHWC`: of the timeline.
        """
        start = self.first_new_frame(timeline)
        for part in self.parts:
            if part.source:
                yield from ((frame, None) for frame in part.source.frames())
            else:
                yield from ((frames_FHWC[start + i], start + i) for i in range(part.first, part.end))

    @property
    def seams(self) -> list[int]:
        """Frames of the result that begin a part, except the first; of a loop also 0, which follows the last one."""
        ends = np.cumsum([part.num_frames for part in self.parts])[:-1].tolist()
        return [*ends, 0] if self.request.loop else ends


class Reader:
    """Frames of sources."""

    def __init__(self, allocate: Allocate):
        self.allocate = allocate

    def first(self, source: Source, count: int) -> np.ndarray:
        return source.first(count)

    def last(self, source: Source, count: int) -> np.ndarray:
        return source.last(count)

    def all(self, source: Source) -> np.ndarray:
        frames_FHWC = self.allocate((source.num_frames, *source.size, 3))
        source.read_into(frames_FHWC)
        return frames_FHWC

    def mask(self, source: Source, frames: int) -> np.ndarray:
        return read_mask(source, frames)


class Outline(Reader):
    """Black frames in place of those of sources; they take no memory."""

    def __init__(self) -> None:
        super().__init__(lambda shape: np.broadcast_to(np.uint8(0), shape))

    def first(self, source: Source, count: int) -> np.ndarray:
        return self.allocate((min(count, source.num_frames), *source.size, 3))

    def last(self, source: Source, count: int) -> np.ndarray:
        return self.first(source, count)

    def all(self, source: Source) -> np.ndarray:
        return self.first(source, source.num_frames)

    def mask(self, source: Source, frames: int) -> np.ndarray:
        return np.broadcast_to(np.bool_(True), (frames, *source.size))


# ---------------------------------------------------------------- checks of files against each other


def image_files(request: Request, frames: int):
    """(frame, flag, path) of each given image."""
    if request.image:
        yield 0, "--image", request.image
    if request.last_image:
        yield frames - 1, "--last-image", request.last_image
    for keyframe in request.keyframes:
        yield keyframe.index, "--keyframes", keyframe.file


def size_of_clip(request: Request, sample: SampleConfig, given: list[Source]) -> tuple[int, int]:
    """Height and width: those of the given files, which must agree, else as --size or sample.size says."""
    asked = parse_size(request.size, "--size") if request.size else None
    for source in given:
        first, name = (asked, "--size") if asked else (given[0].size, given[0].name)
        if source.size != first:
            raise MegaSoraError(
                f"{source.name} {source.path} has {source.height}x{source.width} pixels, {name} is "
                f"{first[0]}x{first[1]}; "
                + ("leave --size out, or give a file of that size" if asked else "give files of one size")
            )
    return asked or (given[0].size if given else parse_size(sample.size, "sample.size"))


def rate_of_clip(request: Request, sample: SampleConfig, video: Source | None) -> float:
    """Frames per second: those of the given video."""
    if video is None:
        return request.fps or sample.fps
    if video.num_frames == 1:
        if request.edit is None:
            raise MegaSoraError(f"{video.name} {video.path} has one frame; give a video, or this file as --image")
        return request.fps or sample.fps
    if not MIN_FPS <= video.fps <= MAX_FPS:
        raise MegaSoraError(f"{video.name} {video.path} has {video.fps:g} fps; it must be from {MIN_FPS} to {MAX_FPS}")
    if request.fps is not None and abs(request.fps - video.fps) > 1e-3 * video.fps:
        raise MegaSoraError(
            f"--fps {request.fps:g} differs from the {video.fps:g} fps of {video.name} {video.path}; leave --fps out"
        )
    return video.fps


def check_same(video: Source, other: Source) -> None:
    """Raises MegaSoraError if two videos differ in size or rate."""
    if video.size != other.size:
        raise MegaSoraError(
            f"--connect {video.path} has {video.height}x{video.width} pixels, {other.path} "
            f"{other.height}x{other.width}; give videos of one size"
        )
    for source in (video, other):
        rate_of_clip(Request("x"), SampleConfig(), source)  # a video, of a rate that can be written
    if abs(video.fps - other.fps) > 1e-3 * video.fps:
        raise MegaSoraError(
            f"--connect {video.path} has {video.fps:g} fps, {other.path} {other.fps:g}; give videos of one frame rate"
        )


def check_mask(mask: Source, video: Source) -> None:
    """Raises MegaSoraError if a mask is not of the size of a video, with one frame or as many."""
    if mask.size != video.size:
        raise MegaSoraError(
            f"--mask {mask.path} has {mask.height}x{mask.width} pixels, --video {video.path} "
            f"{video.height}x{video.width}; give a mask of the same size"
        )
    if mask.num_frames not in (1, video.num_frames):
        raise MegaSoraError(
            f"--mask {mask.path} has {mask.num_frames} frames, --video {video.path} {video.num_frames}; give a mask of "
            "one frame, which holds for all, or of as many"
        )
