"""Checks of clips to sample: their captions and sizes, and the clean frames that the run was trained with
(`objective.frame_conditioning`)."""

from __future__ import annotations

from megasora.config import FrameConditioningConfig
from megasora.data.clip_writer import MAX_FPS
from megasora.errors import MegaSoraError
from megasora.sampling.timeline import Timeline

# where frames are given -> settings of objective.frame_conditioning, one of which must have taught it
TAUGHT_BY = {
    "at the start": ("first", "head", "both"),
    "at the end": ("last", "tail", "both"),
    "at both ends": ("both",),
}


def check_clip(timeline: Timeline) -> None:
    """Raises MegaSoraError for a caption without text and for impossible sizes, rates and seeds."""
    for name, text in (("--prompt", timeline.prompt), ("--negative-prompt", timeline.negative_prompt or "")):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise MegaSoraError(f"{name} is not UTF-8 text: {error}") from None
    if not timeline.prompt.strip():
        raise MegaSoraError("--prompt is empty; describe the clip, e.g. --prompt 'a red circle moves right'")
    if timeline.frames < 1:
        raise MegaSoraError(f"--frames {timeline.frames} must be at least 1")
    if not 0 <= timeline.seed < 1 << 63:
        raise MegaSoraError(f"--seed {timeline.seed} must be from 0 to below 2^63")
    if not 0 < timeline.fps <= MAX_FPS:
        raise MegaSoraError(f"--fps {timeline.fps:g} must be above 0 and at most {MAX_FPS:g}")
    if timeline.height < 1 or timeline.width < 1:
        raise MegaSoraError(f"--size {timeline.height}x{timeline.width} must be at least 1x1 pixels")


def check_abilities(timeline: Timeline, weights: FrameConditioningConfig) -> None:
    """Raises MegaSoraError if frames are given where the run was never trained with clean ones."""
    blocks = [block for block in timeline.given if block.level == 0]
    if not blocks:
        return
    starts, ends = any(b.first == 0 for b in blocks), any(b.end == timeline.frames for b in blocks)
    has_inner = any(b.first > 0 and b.end < timeline.frames for b in blocks)
    where = "at both ends" if has_inner or (starts and ends) else "at the start" if starts else "at the end"
    check_taught(where, "frames that are given", weights)


def check_windows(timeline: Timeline, window_frames: int, weights: FrameConditioningConfig) -> None:
    """Raises MegaSoraError if a clip of several windows is beyond the run: each is given frames of the one before."""
    where = "at the end" if timeline.is_backward else "at the start"
    check_taught(
        where, f"{timeline.frames} frames, which are sampled in windows of {window_frames} that overlap", weights
    )


def check_taught(where: str, what: str, weights: FrameConditioningConfig) -> None:
    keys, defaults = TAUGHT_BY[where], FrameConditioningConfig()
    if any(getattr(weights, key) > 0 for key in keys):
        return
    section = "objective.frame_conditioning"
    zeros = ", ".join(f"{section}.{key}=0" for key in keys)
    remedy = " ".join(f"{section}.{key}={getattr(defaults, key):g}" for key in keys[:2])
    raise MegaSoraError(
        f"{what} need clean frames {where} of a clip, which this run was not trained with ({zeros}); train it further "
        f"with {remedy}"
    )
