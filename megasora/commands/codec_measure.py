"""Measures the reconstruction of a clip by a codec, a few frames at a time.

frames of the clip --pad--> encode_frames --> decode_latents --cut--> compared with the frames, which are held until
the codec returns theirs: memory does not grow with the length of a clip
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megasora.codec.latent_statistics import LatentStatistics
from megasora.codec.metrics import Metrics, psnr_of
from megasora.data.media import OpenClip
from megasora.data.padding import pad_frame
from megasora.data.patches import frames_to_float, frames_to_uint8

if TYPE_CHECKING:
    from megasora.codec import Codec

SHEET_FRAMES, SHEET_HEIGHT = 6, 128  # of a clip on the contact sheet: frames, pixels
DIFFERENCE_GAIN = 4


class CpuTimes:
    """CPU seconds of this process, by name of the iterator that spent them."""

    def __init__(self):
        self.seconds: Counter[str] = Counter()
        self.inner = [0.0]  # seconds of iterators that the running one has called, outermost first

    def timed(self, name: str, items: Iterable[Any]) -> Iterator[Any]:
        """Yields the items; what another timed iterator spends meanwhile counts for that one alone."""
        iterator = iter(items)
        while True:
            start = time.process_time()
            self.inner.append(0.0)
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                spent = time.process_time() - start
                self.seconds[name] += spent - self.inner.pop()
                self.inner[-1] += spent
            yield item


class SheetFrames:
    """At most 2 x SHEET_FRAMES evenly spaced frames of a clip: original, reconstruction, difference, scaled down."""

    def __init__(self):
        self.stride, self.seen = 1, 0
        self.rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, original: np.ndarray, reconstruction: np.ndarray) -> None:
        """The next frame, uint8 [H, W, 3]."""
        if self.seen % self.stride == 0:
            change = np.abs(original.astype(np.int16) - reconstruction) * DIFFERENCE_GAIN
            difference = change.clip(0, 255).astype(np.uint8)
            self.rows.append(tuple(map(scale_to_sheet, (original, reconstruction, difference))))
        self.seen += 1
        if len(self.rows) == 2 * SHEET_FRAMES:
            self.rows, self.stride = self.rows[::2], 2 * self.stride

    def videos(self, title: str) -> list[tuple[str, np.ndarray]]:
        """(label, uint8 [F, H, W, 3]) of the three rows of a contact sheet."""
        labels = (title, "reconstruction", f"difference x {DIFFERENCE_GAIN}")
        return [(label, np.stack(frames)) for label, frames in zip(labels, zip(*self.rows, strict=True), strict=True)]


def scale_to_sheet(frame: np.ndarray) -> np.ndarray:
    """[H, W, 3] -> about SHEET_HEIGHT rows: a mean over pixels, or whole repetitions of them."""
    height, width = frame.shape[:2]
    if height <= SHEET_HEIGHT:
        zoom = max(1, min(SHEET_HEIGHT // height, 2 * SHEET_HEIGHT // width))
        return frame.repeat(zoom, 0).repeat(zoom, 1)
    size = (max(1, round(width * SHEET_HEIGHT / height)), SHEET_HEIGHT)
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX))


class Measurement:
    """The figures of all clips that a codec has reconstructed."""

    def __init__(self, codec: Codec):
        self.codec, self.times, self.latents = codec, CpuTimes(), LatentStatistics(codec.channels)
        self.sums, self.clips, self.pixel_values = torch.zeros_like(Metrics().sums), 0, 0
        self.psnr_sum = 0.0

    def add_clip(self, clip: OpenClip, sheet: SheetFrames | None) -> dict[str, Any]:
        """Reconstructs a clip at its native size and returns its figures; `sheet` gets its frames.

        Raises RejectedClip; the clip is then not counted in the totals, except for its CPU seconds.
        """
        originals: deque[np.ndarray] = deque()

        def padded() -> Iterator[np.ndarray]:
            for frame in self.times.timed("read", clip.frames):
                originals.append(frame)
                yield pad_frame(frame, self.codec.factors[1:])

        statistics = LatentStatistics(self.codec.channels)
        encoded = self.times.timed("encode", self.codec.encode_frames(padded()))
        observed = self.times.timed("statistics", statistics.observe(encoded))
        decoded = self.times.timed("decode", self.codec.decode_latents(observed))
        metrics, size = Metrics(), (0, 0)
        for reconstruction in decoded:
            if not originals:  # beyond the end of the clip
                continue
            original = originals.popleft()
            size = original.shape[:2]
            y = to_frames(reconstruction[: size[0], : size[1]]).clamp(-1, 1)
            metrics.add(y, frames_to_float(to_batch(original)), starts_clip=not metrics.sums[0])
            if sheet:
                sheet.add(original, frames_to_uint8(y)[0].numpy())
        totals = metrics.totals()
        values = totals["frames"] * size[0] * size[1] * 3
        latents = statistics.count * self.codec.channels
        self.latents.add(statistics)
        self.sums, self.clips = self.sums + metrics.sums, self.clips + 1
        self.pixel_values, self.psnr_sum = self.pixel_values + values, self.psnr_sum + totals["psnr"]
        return {**totals, "height": size[0], "width": size[1], "latents_per_pixel_value": latents / values}

    def totals(self) -> dict[str, Any]:
        """Over all clips. psnr: mean over clips; psnr_of_mean_error: of the mean squared error of all frames."""
        all_frames = Metrics()
        all_frames.sums = self.sums
        values = all_frames.totals()
        frames, latents = values["frames"], self.latents.count * self.codec.channels
        latent_mean, latent_std = self.latents.totals()
        speeds = {}
        for name in ("encode", "decode"):
            seconds = self.times.seconds[name]
            speeds |= {
                f"{name}_cpu_seconds": seconds, f"{name}_frames_per_cpu_second": frames / seconds if seconds else None
            }  # fmt: skip
        error = psnr_of(torch.tensor(values["mse"], dtype=torch.float64))
        return {
            **values, "clips": self.clips, "psnr": self.psnr_sum / self.clips, "psnr_of_mean_error": float(error),
            "latents_per_pixel_value": latents / self.pixel_values,
            "latent_mean": latent_mean, "latent_std": latent_std, **speeds,
        }  # fmt: skip


def to_batch(frame_HWC: np.ndarray) -> Tensor:
    """[1, H, W, 3] of the same memory if it may be written."""
    return torch.from_numpy(np.require(frame_HWC, requirements="W"))[None]


def to_frames(frame_HWC: np.ndarray) -> Tensor:
    """[H, W, 3] -> [1, 3, H, W]."""
    return to_batch(frame_HWC).permute(0, 3, 1, 2)
