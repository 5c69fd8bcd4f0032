"""A worker process of an ingest: encodes clips into patches.

    job (a line of JSON) --> bytes -> frames -> filters -> latents -> float16 patches --> file, result (a line of JSON)

It decodes untrusted files. So its memory is limited, it is killed with its parent, and a crash costs one clip only. It
imports numpy and av but not torch, which makes it start in 0.2 s with 50 MB; the network of a learned codec is in a
codec process (codec_process.py). Frames, latents and patches are streamed, a few at a time, so memory does not grow
with the length of a clip.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from megasora.codec import build_frame_encoder
from megasora.config import CodecConfig, IngestConfig
from megasora.data.clip_reader import open_clip
from megasora.data.media import Media, RejectedClip, sha256
from megasora.data.padding import pad_frame
from megasora.errors import MegaSoraError
from megasora.ingest.child_process import die_with_parent
from megasora.ingest.duplicates import frame_hash
from megasora.ingest.filters import FrameStats, Thumbnails, check_duration, load_score_functions
from megasora.ingest.float16 import Float16Converter
from megasora.ingest.library_warnings import END_OF_JOB, log_decoder_errors, print_line, python_warnings_to
from megasora.ingest.remote_encoder import CodecProcessEnded, RemoteEncoder
from megasora.ingest.results import EncodedClip, FoundScenes, Rejection, Result, to_message
from megasora.ingest.scenes import SceneDetector, color_cells

MAX_CACHED_HASHES = 64
DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # of the disk written to, not of the clip


def worker_settings(codec: CodecConfig, limits: IngestConfig, patch: list[int]) -> dict[str, Any]:
    """The first line that a worker process reads, as JSON values."""
    return {"codec": asdict(codec), "ingest": asdict(limits), "patch": list(patch), "parent": os.getpid()}


def encode_job(media: Media, patch_path: Path) -> dict[str, Any]:
    """A job, as JSON values, that encodes a clip and writes its patches to the file `patch_path`."""
    return {**asdict(media), "path": str(media.path), "patch_path": str(patch_path)}


def scene_job(media: Media, threshold: float, min_seconds: float) -> dict[str, Any]:
    """A job, as JSON values, that finds the scenes of a clip and writes nothing."""
    return {**encode_job(media, Path()), "find_scenes": [threshold, min_seconds]}


class StreamEncoder(Protocol):
    """DCTEncoder or RemoteEncoder."""

    factors: tuple[int, int, int]

    def encode(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]: ...


class Worker:
    """Runs jobs, one at a time, in this process."""

    def __init__(self, encoder: StreamEncoder, limits: IngestConfig, patch: list[int]):
        self.encoder, self.limits, self.patch = encoder, limits, tuple(patch[1:])
        self.to_float16 = Float16Converter()
        self.score_functions = load_score_functions(limits.scores)
        self.file_hashes: dict[tuple, str] = {}

    def run_job(self, job: dict[str, Any]) -> Result:
        """The result of a job of `encode_job` or `scene_job`."""
        patch_path, find_scenes = job.pop("patch_path"), job.pop("find_scenes", None)
        media = Media(**{**job, "path": Path(job["path"])})
        try:
            if find_scenes:
                return self.find_scenes(media, *find_scenes)
            with open(patch_path, "wb") as file:
                return self.encode(media, file)
        except RejectedClip as error:
            return Rejection(error.filter_name, error.reason, str(error))
        except CodecProcessEnded:
            raise
        except MegaSoraError as error:
            raise MegaSoraError(f"{media}: {error}") from None
        except MemoryError:
            memory = f"ingest.worker_memory_mib={self.limits.worker_memory_mib}"
            message = f"{media} needs more memory than {memory} to decode"
            return Rejection("decode", "too large in memory", message)
        except OSError as error:
            if error.errno in DISK_ERRNOS:
                error.filename = error.filename or patch_path
                raise
            return Rejection("decode", "unreadable", f"{media}: {error}")

    def encode(self, media: Media, file: BinaryIO) -> EncodedClip:
        """Writes the float16 patches [l, P] of a clip to `file`."""
        limits, name, quality = self.limits, str(media), {}
        with open_clip(media, limits) as clip:
            frames = check_duration(clip.frames, clip.fps, name, limits)
            measures = limits.record_quality or limits.min_motion or limits.min_contrast
            stats = FrameStats(name, limits) if measures else None
            thumbnails = Thumbnails(clip.fps) if self.score_functions else None
            for observer in (stats, thumbnails):
                frames = observer.observe(frames) if observer else frames
            counter = FrameCounter(frames)
            grid, patch_dim = self.write_patches(counter, name, file)
        if stats:
            quality.update(stats.values())
        if thumbnails:
            quality.update(thumbnails.scores(name, self.score_functions))
        (height, width), fps = counter.size, clip.fps if counter.count > 1 else 0.0
        return EncodedClip(height, width, counter.count, fps, grid, patch_dim, self.file_hash(media), quality)

    def write_patches(self, frames: Iterator[np.ndarray], name: str, file: BinaryIO) -> tuple[list[int], int]:
        """Encodes uint8 frames [H, W, 3] and appends their patches to `file`; returns the grid [t, h, w] and P."""
        _, ph, pw = self.encoder.factors
        multiple = (ph * self.patch[0], pw * self.patch[1])
        t = 0
        with closing(self.encoder.encode(pad_frame(frame, multiple) for frame in frames)) as latents:
            for latent in latents:
                try:
                    patches, (h, w) = patchify_frame(self.to_float16(latent), self.patch)
                except OverflowError as error:
                    message = f"{name}: latent frame {t + 1}: {error}; look at its pixels and the codec"
                    raise RejectedClip("not finite", message, "codec") from None
                file.write(patches)
                t += 1
        return [t, h, w], patches.shape[1]

    def find_scenes(self, media: Media, threshold: float, min_seconds: float) -> FoundScenes:
        """The scenes of at least `min_seconds`; `threshold`: of SceneDetector."""
        with open_clip(media, self.limits) as clip:
            detector, hashes = SceneDetector(threshold, round(min_seconds * clip.fps)), []
            for frame in clip.frames:
                cells = color_cells(frame)
                detector.add_frame(cells)
                hashes.append(frame_hash(cells))
        scenes, seconds = [], [*clip.timestamps, media.end]
        for first, stop in detector.scenes():
            start = media.start if first == 0 else round(seconds[first], 6)
            end = media.end if stop == len(hashes) else round(seconds[stop], 6)
            scenes.append([start, end, hashes[first], hashes[(first + stop) // 2]])
        return FoundScenes(scenes)

    def file_hash(self, media: Media) -> str:
        """SHA-256 of the file's bytes, cached, because the excerpts of one file follow each other."""
        key = (media.path, media.offset, media.size, os.stat(media.path).st_mtime_ns)
        if key not in self.file_hashes:
            if len(self.file_hashes) == MAX_CACHED_HASHES:
                self.file_hashes.pop(next(iter(self.file_hashes)))
            self.file_hashes[key] = sha256(media)
        return self.file_hashes[key]


class FrameCounter:
    """Iterates over frames; records how many there were, and the height and width of the last."""

    def __init__(self, frames: Iterator[np.ndarray]):
        self.frames, self.count, self.size = frames, 0, (0, 0)

    def __iter__(self) -> Iterator[np.ndarray]:
        for frame in self.frames:
            self.count, self.size = self.count + 1, frame.shape[:2]
            yield frame


def patchify_frame(latent_HWC: np.ndarray, patch: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """One latent frame [H, W, C] -> its patches [h*w, C*ph*pw], and (h, w). As `patchify`, without torch."""
    height, width, channels = latent_HWC.shape
    h, w = height // patch[0], width // patch[1]
    x = latent_HWC.reshape(h, patch[0], w, patch[1], channels).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(x).reshape(h * w, -1), (h, w)


def build_encoder(settings: dict[str, Any], waits: Callable[[bool], None]) -> StreamEncoder:
    """The encoder of this worker: that of a codec process, if the pool has given it a socket."""
    codec = CodecConfig(**settings["codec"])
    if "codec_socket" in settings:
        return RemoteEncoder(socket.socket(fileno=settings["codec_socket"]), codec.factors, waits)
    return build_frame_encoder(codec)


def main() -> None:
    """Reads settings from the first line of standard input, then jobs; writes one line per job to standard output.

    What libraries print or warn goes to standard error, as lines that the pool counts.
    """
    output = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what libraries print must not be read as a result
    settings = json.loads(sys.stdin.readline())
    limits = IngestConfig(**settings["ingest"])
    die_with_parent(settings["parent"])
    resource.setrlimit(resource.RLIMIT_AS, (limits.worker_memory_mib << 20, limits.worker_memory_mib << 20))

    def send(message: dict[str, Any]) -> None:
        output.write(json.dumps(message) + "\n")
        output.flush()

    try:
        worker = Worker(build_encoder(settings, lambda waits: send({"waits": waits})), limits, settings["patch"])
        log_decoder_errors()
        print_line(f"\n{END_OF_JOB}")
        send({"ready": True})
        with python_warnings_to(print_line):
            for line in sys.stdin:
                result = to_message(worker.run_job(json.loads(line)))
                sys.stdout.flush()
                print_line(f"\n{END_OF_JOB}")
                send(result)
    except CodecProcessEnded:
        send({"codec_ended": True})
    except (MegaSoraError, OSError) as error:
        send({"error": str(error)})
    except BrokenPipeError:
        pass
