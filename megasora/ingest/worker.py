"""A child process that turns clips into patches.

    a line of JSON --> bytes -> frames -> stages -> latents -> patches, f16, in the job's file --> a line of JSON

It decodes what strangers made, so it has a limit on its memory, it is killed with its parent, and whatever happens to
it costs one clip. It imports numpy and av, no torch: 0.2 s to start, 50 MB. Frames, latents and patches pass one run at
a time, so its memory does not grow with the length of a clip.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megasora.codec import build_stream
from megasora.config import CodecConfig, IngestConfig
from megasora.data.video import Media, RejectedClip, open_clip, sha256
from megasora.errors import MegaSoraError
from megasora.ingest.duplicates import frame_hash
from megasora.ingest.half import Half
from megasora.ingest.scenes import Scenes, grid
from megasora.ingest.stages import Meter, Thumbnails, load_scores, within_length

HASHES_KEPT = 64
OUR_OWN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # errors of writing: no fault of the clip
PR_SET_PDEATHSIG = 1


def settings_of(codec: CodecConfig, limits: IngestConfig, patch: list[int]) -> dict[str, Any]:
    """What a Worker is built from, as JSON."""
    return {"codec": asdict(codec), "ingest": asdict(limits), "patch": list(patch), "parent": os.getpid()}


def job_of(media: Media, spool: Path) -> dict[str, Any]:
    """What `Worker.work` takes, as JSON. `spool`: the file to write patches to."""
    values = asdict(media)
    return {**values, "path": str(media.path), "spool": str(spool)}


def look_of(media: Media, threshold: float, min_seconds: float) -> dict[str, Any]:
    """A job that writes nothing and finds scenes, as JSON."""
    return {**job_of(media, Path()), "look": [threshold, min_seconds]}


class Worker:
    def __init__(self, codec: CodecConfig, limits: IngestConfig, patch: list[int]):
        self.stream, self.limits, self.patch = build_stream(codec), limits, tuple(patch[1:])
        self.half = Half()
        self.scores = load_scores(limits.scores)
        self.hashes: dict[tuple, str] = {}

    def work(self, job: dict[str, Any]) -> dict[str, Any]:
        """Facts of a clip whose patches were written, or why there are none."""
        spool, look = job.pop("spool"), job.pop("look", None)
        media = Media(**{**job, "path": Path(job["path"])})
        try:
            if look:
                return self.look(media, *look)
            with open(spool, "wb") as file:
                return self.encode(media, file)
        except RejectedClip as error:
            return {"stage": error.stage, "reason": error.reason, "message": str(error)}
        except MemoryError:
            message = f"{media} needs more memory than ingest.memory_mib={self.limits.memory_mib} to decode"
            return {"stage": "decode", "reason": "too large in memory", "message": message}
        except OSError as error:
            if error.errno in OUR_OWN:
                raise
            return {"stage": "decode", "reason": "unreadable", "message": f"{media}: {error}"}

    def encode(self, media: Media, file: BinaryIO) -> dict[str, Any]:
        limits, name, quality = self.limits, str(media), {}
        _, ph, pw = self.stream.factors
        multiple = (ph * self.patch[0], pw * self.patch[1])
        with open_clip(media, limits) as clip:
            frames = within_length(clip.frames, clip.fps, name, limits)
            meter = Meter(name, limits) if limits.measure or limits.min_motion or limits.min_contrast else None
            thumbnails = Thumbnails(clip.fps) if self.scores else None
            for stage in (meter, thumbnails):
                frames = stage.watch(frames) if stage else frames
            seen = Counted(frames)
            grid_t = 0
            for latent in self.stream.encode(padded(seen, multiple)):
                try:
                    patches, grid = to_patches(self.half(latent), self.patch)
                except OverflowError as error:
                    message = f"{name}: latent frame {grid_t + 1}: {error}; look at its pixels and the codec"
                    raise RejectedClip("not finite", message, "codec") from None
                file.write(patches)
                grid_t += 1
        if meter:
            quality.update(meter.values())
        if thumbnails:
            quality.update(thumbnails.scores(name, self.scores))
        return {
            "height": seen.shape[0], "width": seen.shape[1], "frames": seen.count,
            "fps": clip.fps if seen.count > 1 else 0.0, "grid": [grid_t, *grid], "width_of_token": patches.shape[1],
            "sha256": self.hash(media), "quality": quality,
        }  # fmt: skip

    def look(self, media: Media, threshold: float, min_seconds: float) -> dict[str, Any]:
        """`scenes`: of each, the seconds at which it begins and ends (null: with the file), and two frames' hashes."""
        with open_clip(media, self.limits) as clip:
            scenes, hashes = Scenes(threshold, round(min_seconds * clip.fps)), []
            for frame in clip.frames:
                cells = grid(frame)
                scenes.add(cells)
                hashes.append(frame_hash(cells))
        found, moments = [], [*clip.seconds, media.end]
        for first, end in scenes.spans():
            begin = media.start if first == 0 else round(moments[first], 6)
            stop = media.end if end == len(hashes) else round(moments[end], 6)
            found.append([begin, stop, hashes[first], hashes[(first + end) // 2]])
        return {"scenes": found}

    def hash(self, media: Media) -> str:
        """Of the file's bytes; several excerpts of one file come one after the other."""
        key = (media.path, media.offset, media.size, os.stat(media.path).st_mtime_ns)
        if key not in self.hashes:
            if len(self.hashes) == HASHES_KEPT:
                self.hashes.pop(next(iter(self.hashes)))
            self.hashes[key] = sha256(media)
        return self.hashes[key]


class Counted:
    """Frames on their way, and how many of what size have passed."""

    def __init__(self, frames: Iterator[np.ndarray]):
        self.frames, self.count, self.shape = frames, 0, (0, 0)

    def __iter__(self) -> Iterator[np.ndarray]:
        for frame in self.frames:
            self.count, self.shape = self.count + 1, frame.shape[:2]
            yield frame


def padded(frames: Iterator[np.ndarray], multiple: tuple[int, int]) -> Iterator[np.ndarray]:
    """Repeats the last row and column until height and width are multiples; as `data.patches.pad_frames`."""
    for frame in frames:
        down, right = (-n % m for n, m in zip(frame.shape[:2], multiple, strict=True))
        yield np.pad(frame, ((0, down), (0, right), (0, 0)), mode="edge") if down or right else frame


def to_patches(latent_HWC: np.ndarray, patch: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """One latent frame -> its patches [h*w, C*ph*pw] and (h, w); as `data.patches.patchify`."""
    height, width, channels = latent_HWC.shape
    h, w = height // patch[0], width // patch[1]
    x = latent_HWC.reshape(h, patch[0], w, patch[1], channels).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(x).reshape(h * w, -1), (h, w)


def confine(parent: int, memory_mib: int) -> None:
    """Memory limited, killed with the parent; the parent alone answers Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Settings on the first line of standard input, then jobs; an answer to each on standard output."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what others print is no answer
    settings = json.loads(sys.stdin.readline())
    confine(settings["parent"], settings["ingest"]["memory_mib"])

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        worker = Worker(CodecConfig(**settings["codec"]), IngestConfig(**settings["ingest"]), settings["patch"])
        answer({"ready": True})
        for line in sys.stdin:
            answer(worker.work(json.loads(line)))
    except (MegaSoraError, OSError) as error:
        answer({"error": str(error)})
    except BrokenPipeError:
        pass
