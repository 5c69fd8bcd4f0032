"""Pictures with transparency on their background, and the frames of an animation on each other."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

import numpy as np

from megasora.data.media_formats import ALPHA_BACKGROUND


class Disposal(Enum):
    """What happens to the area of a frame before the next one."""

    KEEP = "keep"
    CLEAR = "clear"  # it becomes transparent
    RESTORE = "restore"  # it becomes what it was before the frame


@dataclass(frozen=True)
class FrameArea:
    """Where and how a frame of an animation is drawn, and how long it is shown."""

    height: int
    width: int
    y: int = 0
    x: int = 0
    seconds: Fraction = Fraction(0)
    disposal: Disposal = Disposal.KEEP
    blends: bool = True  # over what was there before; False: replaces it, transparency included


class Canvas:
    """The picture that the frames of an animation are drawn on: uint8 [H, W, 4], transparent at first."""

    def __init__(self, height: int, width: int):
        self.pixels_HW4 = np.zeros((height, width, 4), np.uint8)

    def draw(self, rgba_HWC: np.ndarray, frame: FrameArea) -> np.ndarray:
        """uint8 [H, W, 3], what is shown once the part of a frame within the canvas is drawn."""
        area = self.pixels_HW4[frame.y : frame.y + frame.height, frame.x : frame.x + frame.width]
        before = area.copy() if frame.disposal is Disposal.RESTORE else None
        pixels_HWC = rgba_HWC[: area.shape[0], : area.shape[1]]
        if pixels_HWC.shape[2] == 3:
            area[..., :3], area[..., 3] = pixels_HWC, 255
        else:
            area[:] = over(pixels_HWC, area) if frame.blends else pixels_HWC
        shown = on_background(self.pixels_HW4)
        if frame.disposal is Disposal.CLEAR:
            area[:] = 0
        elif frame.disposal is Disposal.RESTORE:
            area[:] = before
        return shown


def over(above_HW4: np.ndarray, below_HW4: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 4]: the first picture over the second, neither of them premultiplied by its alpha."""
    alpha = above_HW4[..., 3:]
    result = np.where(alpha > 0, above_HW4, below_HW4)
    mixed = ((alpha > 0) & (alpha < 255))[..., 0]
    if mixed.any():
        above, below = above_HW4[mixed].astype(np.float32), below_HW4[mixed].astype(np.float32)
        weight, below_weight = above[:, 3:] / 255, (1 - above[:, 3:] / 255) * below[:, 3:] / 255
        total = weight + below_weight
        colors = (above[:, :3] * weight + below[:, :3] * below_weight) / total
        result[mixed] = np.rint(np.concatenate([colors, total * 255], 1))
    return result


def on_background(rgba_HWC: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3]: a picture of 4 channels on `ALPHA_BACKGROUND`; one of 3 as it is."""
    rgb, alpha = rgba_HWC[..., :3], rgba_HWC[..., 3:]
    if (alpha == 255).all():
        return np.ascontiguousarray(rgb)
    result = np.empty(rgb.shape, np.uint8)
    weight = alpha[..., 0].astype(np.uint16)
    for channel, background in enumerate(ALPHA_BACKGROUND):  # one at a time: less memory
        total = rgb[..., channel] * weight + np.uint16(background) * (255 - weight)
        result[..., channel] = (total + np.uint16(127)) // np.uint16(255)
    return result
