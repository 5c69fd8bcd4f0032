"""How often the watermark is found: python -m benchmarks.watermark [--out benchmarks/results/watermark.json]

Clips of four sizes, each with and without the watermark, go through what files go through on their way:

    crf       H.264 at CRF 23 (libx264, its default preset), decoded
    crop      10 % of each side cut off, at one of the four corners
    both      crf, then crop: the share of detections is the figure that counts
    again     both, then H.264 at CRF 23 once more

The small clips are those of `megasora.testing.clips` with all backgrounds and shapes; the large ones a camera that
moves over a texture whose spectrum falls as in photographs, with some noise of the sensor. PSNR is that of the marked
frames.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.record import environment, write_record
from megasora.config import IngestConfig
from megasora.data.clip_reader import read_clip
from megasora.sampling.watermark import apply_watermark, detect_watermark, frames_to_read
from megasora.testing.clips import BACKGROUNDS, SHAPES, render, sample_spec
from megasora.testing.video_files import Encoding, encode_video

CRF23 = Encoding(options={"crf": "23", "mbtree": "0"})  # with mbtree, x264 reads past the edge of very small frames
SMALL = 10_000  # pixels: rendered clips; larger ones are of the camera
SIZES = ["24x24x9", "32x48x17", "48x80x17", "240x320x33"]
COUNTS = [200, 200, 200, 40]  # of these sizes


@dataclass(frozen=True)
class Result:
    size: str  # height x width x frames
    way: str
    clips: int
    detected: float  # share of the marked clips
    false_alarms: float  # share of the unmarked ones
    lowest_score: float  # of 95 % of the marked clips
    highest_score: float  # of the unmarked ones
    psnr_db: float


def draw_clip(seed: int, height: int, width: int, frames: int) -> np.ndarray:
    """uint8 [F, H, W, 3]."""
    rng = np.random.default_rng([seed, height, width])
    if height * width < SMALL:
        sizes = {"native_sizes": {(height, width): 1.0}, "lengths": {frames: 1.0}}
        return render(sample_spec(rng, backgrounds=BACKGROUNDS, shapes=SHAPES, **sizes))
    return camera(rng, height, width, frames)


def camera(rng: np.random.Generator, height: int, width: int, frames: int) -> np.ndarray:
    """Views of a random texture, moved by up to two pixels per frame."""
    reach = 2 * frames
    shape = (height + 2 * reach, width + 2 * reach)
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1]))
    spectrum = np.fft.rfft2(rng.normal(size=(3, *shape))) / np.maximum(frequency, 1 / max(shape)) ** rng.uniform(1, 1.4)
    world = np.fft.irfft2(spectrum, s=shape)
    world = 0.8 * world[:1] + 0.2 * world  # channels of a photograph are alike
    world = 128 + world * rng.uniform(25, 60) / world.std()
    step, noise = rng.uniform(-2, 2, 2), rng.choice([0.0, 1.0, 3.0])
    views = []
    for i in range(frames):
        y, x = (np.rint(reach + step * i)).astype(int)
        view = world[:, y : y + height, x : x + width].transpose(1, 2, 0)
        views.append(np.clip(np.rint(view + rng.normal(0, 1, view.shape) * noise), 0, 255).astype(np.uint8))
    return np.stack(views)


def encoded(frames_FHWC: np.ndarray, folder: Path) -> np.ndarray:
    """The frames after H.264 at CRF 23."""
    return read_clip(encode_video(folder / "clip.mp4", list(frames_FHWC), how=CRF23), IngestConfig()).frames_FHWC


def cropped(frames_FHWC: np.ndarray, corner: int) -> np.ndarray:
    """90 % of each side, even, at corner 0 to 3."""
    height, width = (2 * round(0.45 * side) for side in frames_FHWC.shape[1:3])
    top = (frames_FHWC.shape[1] - height) * (corner // 2)
    left = (frames_FHWC.shape[2] - width) * (corner % 2)
    return frames_FHWC[:, top : top + height, left : left + width]


def ways(frames_FHWC: np.ndarray, corner: int, folder: Path) -> dict[str, np.ndarray]:
    crf = encoded(frames_FHWC, folder)
    both = cropped(crf, corner)
    return {"crf": crf, "crop": cropped(frames_FHWC, corner), "both": both, "again": encoded(both, folder)}


def score(frames_FHWC: np.ndarray) -> tuple[bool, float]:
    reading = detect_watermark([frames_FHWC[i] for i in frames_to_read(*frames_FHWC.shape[:3])])
    return reading.found, reading.score


def measure(size: str, clips: int, first: int) -> list[Result]:
    """Of clips number `first` and on."""
    marked: dict[str, list[tuple[bool, float]]] = {}
    plain: dict[str, list[tuple[bool, float]]] = {}
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + clips):
            frames = draw_clip(seed, *map(int, size.split("x")))
            changed = np.stack([apply_watermark(frame) for frame in frames])
            errors.append(np.square(changed.astype(np.float32) - frames).mean())
            for scores, video in ((marked, changed), (plain, frames)):
                for way, result in ways(video, seed % 4, Path(folder)).items():
                    scores.setdefault(way, []).append(score(result))
    psnr = float(10 * np.log10(255**2 / np.mean(errors)))
    return [
        Result(
            size, way, clips, float(np.mean([found for found, _ in marked[way]])),
            float(np.mean([found for found, _ in plain[way]])),
            float(np.quantile([value for _, value in marked[way]], 0.05)),
            float(max(value for _, value in plain[way])), psnr,
        )
        for way in marked
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file for all results")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="HxWxF", help="height, width, frames")
    parser.add_argument("--clips", type=int, nargs="+", default=COUNTS, help="clips of each size")
    parser.add_argument("--first", type=int, default=1000, help="number of the first clip")
    options = parser.parse_args(arguments)
    if len(options.clips) != len(options.sizes):
        parser.error(f"--clips has {len(options.clips)} numbers, --sizes {len(options.sizes)}")
    head, console, results = environment(), Console(width=120), []
    table = Table(title="watermark")
    for name in ("size", "way", "clips", "detected", "false alarms", "5 % below", "unmarked, highest", "PSNR, dB"):
        table.add_column(name, justify="right")
    for size, clips in zip(options.sizes, options.clips, strict=True):
        for r in measure(size, clips, options.first):
            results.append(r)
            table.add_row(
                r.size, r.way, str(r.clips), f"{r.detected:.1%}", f"{r.false_alarms:.1%}", f"{r.lowest_score:.1f}",
                f"{r.highest_score:.1f}", f"{r.psnr_db:.1f}",
            )  # fmt: skip
        if options.out:
            write_record(options.out, head, {"first_clip": options.first, "results": [asdict(r) for r in results]})
    console.print(table)


if __name__ == "__main__":
    main()
