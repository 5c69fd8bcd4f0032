"""Rotary frequencies for clips larger than those trained on: changes of the frequencies of `rope3d.py` in sampling.

    ntk      each axis with the NTK factor max(1, size / trained size): the fastest pair keeps its frequency, the angles
             of the slowest stay within those of training
    riflex   one pair of the time axis, whose period is the shortest that is not below the trained frames, gets the
             frequency 0.9 (2 pi / frames), and nothing else changes (RIFLEx, arXiv 2502.15894, eq. 8)

A pair of frequency f has the period 2 pi / f positions: tokens so far apart look the same to it. The model has met the
repetitions of pairs with a period shorter than the trained clips. That of the next one, which RIFLEx calls intrinsic,
it has not: in a longer clip the motion begins anew there. The authors find this pair from the frame at which clips of
the trained model first repeat; the rule above needs none, and gives their choices for CogVideoX (13 latent frames:
period 20) and HunyuanVideo (33: period 50). A clip that is shorter than this period is left as it is, as in their code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

METHODS = ("ntk", "riflex")
PERIOD_FRACTION = 0.9  # of the new period that the clip covers


@dataclass(frozen=True)
class RopeScaling:
    """For clips of `grid` = latent frames, rows, columns of tokens, if those trained on had at most `trained_grid`."""

    method: str  # one of METHODS
    trained_grid: tuple[int, int, int]
    grid: tuple[int, int, int]

    def __post_init__(self):
        """ValueError for another method, or grids that are not three numbers above 0."""
        if self.method not in METHODS:
            raise ValueError(f"method={self.method} must be one of {', '.join(METHODS)}")
        for name in ("trained_grid", "grid"):
            sizes = getattr(self, name)
            if len(sizes) != 3 or not all(size > 0 for size in sizes):
                raise ValueError(f"{name}={tuple(sizes)} must be three numbers above 0, for t, h and w")

    def ntk_factors(self) -> tuple[float, ...]:
        """The NTK factors of t, h and w; 1 for another method."""
        if self.method != "ntk":
            return (1.0, 1.0, 1.0)
        return tuple(max(1.0, new / trained) for new, trained in zip(self.grid, self.trained_grid, strict=True))

    def scale_time(self, frequency_t: Tensor) -> Tensor:
        """The frequencies of the pairs of the time axis, fastest first, changed by RIFLEx if it is the method."""
        pair = intrinsic_pair(frequency_t.tolist(), self.trained_grid[0])
        frames = self.grid[0]
        if self.method != "riflex" or pair is None or frames <= 2 * math.pi / float(frequency_t[pair]):
            return frequency_t
        scaled_t = frequency_t.clone()
        scaled_t[pair] = PERIOD_FRACTION * 2 * math.pi / frames
        return scaled_t


def intrinsic_pair(frequencies: Sequence[float], trained_frames: int) -> int | None:
    """The pair with the shortest period that is not below `trained_frames`; None if all are."""
    periods = [2 * math.pi / frequency for frequency in frequencies]
    unseen = [pair for pair, period in enumerate(periods) if period >= trained_frames]
    return min(unseen, key=lambda pair: periods[pair], default=None)
