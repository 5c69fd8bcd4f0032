"""HDR and wide-gamut pixels to sRGB.

    signal --EOTF--> light, BT.2020 --matrix--> light, BT.709 --tone curve--> 0 to 1 --sRGB--> uint8

Light is relative to reference white, 203 cd/m2 [ITU-R BT.2408]. PQ and HLG are those of ITU-R BT.2100, HLG on a display
of 1,000 cd/m2. The curve leaves a pixel as it is up to 0.8 of reference white, and compresses 0.8 to 1,000 cd/m2 into
the rest; it scales the three colours by the same factor, so the hue stays. SDR video with the primaries of BT.2020 has
no curve; its transfer is that of ITU-R BT.1886, in and out.
"""

from __future__ import annotations

import numpy as np

PQ, HLG, BT2020 = 16, 18, 9  # transfer characteristics and primaries in ITU-T H.273
WHITE = 203.0  # cd/m2
PEAK = 1000.0  # cd/m2
KNEE = 0.8  # of reference white
GAMMA = 2.4  # of BT.1886
BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)
BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)  # ITU-R BT.2087
LEVELS = 1 << 16


class ToneMap:
    """Converts the pixels of a video that declares its transfer characteristic and primaries."""

    def __init__(self, transfer: int, primaries: int):
        signal = np.arange(LEVELS) / (LEVELS - 1)
        self.is_hlg, self.is_hdr = transfer == HLG, transfer in (PQ, HLG)
        to_light = {PQ: pq_to_light, HLG: hlg_to_scene}.get(transfer, lambda x: x**GAMMA)
        encode = light_to_srgb if self.is_hdr else lambda x: x ** (1 / GAMMA)
        self.light_of_level = to_light(signal).astype(np.float32)
        self.level_of_light = np.rint(255 * encode(signal)).astype(np.uint8)
        self.to_bt709 = (BT2020_TO_BT709 if primaries == BT2020 else np.eye(3, dtype=np.float32)).T.copy()

    @staticmethod
    def is_needed(transfer: int, primaries: int) -> bool:
        """True if pixels of this kind are not those of an SDR display with the primaries of BT.709, or close to it."""
        return transfer in (PQ, HLG) or primaries == BT2020

    def convert(self, levels_HWC: np.ndarray) -> np.ndarray:
        """uint16 [H, W, 3], full range -> uint8 [H, W, 3]."""
        light = self.light_of_level[levels_HWC]
        if self.is_hlg:
            light = scene_to_display(light)
        light = np.maximum(light @ self.to_bt709, 0)
        if self.is_hdr:
            light *= tone_curve_factor(light.max(-1, keepdims=True))
        return self.level_of_light[np.rint(np.minimum(light, 1) * (LEVELS - 1)).astype(np.uint16)]


def tone_curve_factor(brightest: np.ndarray) -> np.ndarray:
    """The factor for all colours of a pixel from its brightest one; light relative to reference white."""
    peak = (PEAK / WHITE - KNEE) / (1 - KNEE)
    x = np.maximum(brightest - KNEE, 0) / (1 - KNEE)
    compressed = KNEE + (1 - KNEE) * np.minimum(x * (1 + 1 / peak) / (1 + x), 1)
    return np.where(brightest > KNEE, compressed / np.maximum(brightest, KNEE), 1).astype(np.float32)


def pq_to_light(signal: np.ndarray) -> np.ndarray:
    """The PQ signal, 0 to 1, to display light relative to reference white."""
    power = signal ** (1 / 78.84375)
    return 10_000 / WHITE * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)


def hlg_to_scene(signal: np.ndarray) -> np.ndarray:
    """The HLG signal, 0 to 1, to scene light, 0 to 1."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def scene_to_display(scene_HWC: np.ndarray) -> np.ndarray:
    """Scene light of HLG to display light relative to reference white."""
    luma = scene_HWC @ BT2020_LUMA
    return scene_HWC * (PEAK / WHITE * luma ** np.float32(0.2))[..., None]


def light_to_srgb(light: np.ndarray) -> np.ndarray:
    """Light, 0 to 1, to the sRGB signal."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
