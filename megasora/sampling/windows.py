"""Windows: a long timeline is sampled in parts of at most the length that the model was trained on.

    forward      [window 0          ]                      each window begins with the last frames of the one before,
                             [ctx|  window 1      ]        as clean context; the codec encodes them anew
                                           [ctx| ... ]
    backward     the same from the end to the start: the clean context is at the end of a window

A codec encodes the first frame of a clip alone, and then groups of `ft` frames: a window has 1 + k ft frames, clean
context at its start 1 + j ft, at its end j ft. So boundaries of windows are boundaries of latent frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megasora.codec import clip_sizes


@dataclass(frozen=True)
class Window:
    """Frames `first` to `end` - 1 of a timeline. Frames outside of it (first < 0) are sampled and left out."""

    first: int
    end: int

    @property
    def frames(self) -> int:
        return self.end - self.first


def plan_windows(frames: int, window: int, context: int, ft: int, is_backward: bool) -> list[Window]:
    """The windows of a timeline of `frames` frames, in the order in which they are sampled.

    `window`: frames of a window, at least 1 + ft. `context`: frames that neighbours share, rounded down to what is
    possible, at least one latent frame. `ft`: frames of a latent frame of the model's grid.
    """
    if frames <= whole(window, ft):
        length = round_up(frames, ft)
        first = frames - length if is_backward else 0
        return [Window(first, frames if is_backward else min(length, frames))]
    longest = whole(window, ft)
    if is_backward:
        return plan_backward(frames, longest, max(ft, context // ft * ft), ft)
    shared = min(whole(context, ft), longest - ft)
    windows, at = [Window(0, longest)], longest
    while at < frames:
        first = at - shared
        end = min(first + longest, frames)
        windows.append(Window(first, end))
        at = end
    return windows


def plan_backward(frames: int, longest: int, shared: int, ft: int) -> list[Window]:
    shared = min(shared, longest - 1)
    windows, at = [Window(frames - longest, frames)], frames - longest
    while at > 0:
        end = at + shared
        new = min(at, longest - shared)
        length = round_up(new + shared, ft)
        windows.append(Window(end - length, end))
        at = end - length
    return windows


def whole(frames: int, ft: int) -> int:
    """The largest 1 + k ft that is at most `frames`, at least 1."""
    return 1 + max(frames - 1, 0) // ft * ft


def round_up(frames: int, ft: int) -> int:
    """The smallest 1 + k ft that is at least `frames`."""
    return clip_sizes.num_frames(clip_sizes.latent_frames(frames, ft), ft)


def group_of_frames(frames: int, ft: int) -> np.ndarray:
    """int64 [F]: the latent frame of each frame of a window: 0 for the first, then `ft` frames each."""
    return (np.arange(frames) + ft - 1) // ft
