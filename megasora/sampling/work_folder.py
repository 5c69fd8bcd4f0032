"""WorkFolder: what is done of a clip, beside the file that it becomes, so that the same command goes on after it.

    .OUT.mp4.work/request.json                      what the latents are of: request, settings, checkpoint, files
                  window-00003-pass-0.safetensors   latents of a window, saved before they are decoded
                  frames-0.npy, given-0.npy         frames, while the command runs; in memory if they are few

Another request discards what is there. After success the folder is removed, or only the latents are kept.
"""

from __future__ import annotations

import glob
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from megasora.errors import MegaSoraError
from megasora.files import atomic_writer, read_regular_file, write_text_atomic
from megasora.jsonl import parse_json
from megasora.locks import locked
from megasora.sampling.frame_store import FrameStore, frames_in_file
from megasora.sampling.timeline import Timeline

REQUEST, LOCK, LATENTS, SUFFIX = "request.json", "lock", "latents", ".safetensors"
MAX_REQUEST_BYTES = 1 << 24
LARGE = 256 << 20  # bytes of frames that are kept in a file
SPARE = 64 << 20  # bytes that stay free


class WorkFolder:
    """An open work folder. `rank`: of several processes that share it, each has its own files of frames.

    `part`: of a film, the shot that latents are of; each part is discarded on its own.
    """

    def __init__(self, folder: Path, rank: int = 0, part: str = ""):
        self.folder, self.rank, self.part = folder, rank, part

    @classmethod
    @contextmanager
    def open(cls, out: Path, fingerprint: dict[str, Any], parts: dict[str, str] | None = None) -> Iterator[WorkFolder]:
        """The work folder of `out`, locked. What it holds of another request is removed first, at the end all but the
        latents. `parts`: fingerprint of each part. Raises MegaSoraError if another process writes `out`."""
        folder, parts = folder_of(out), parts or {}
        with locked(folder / LOCK, str(out)):
            work = cls(folder)
            before = work.read_request()
            if before.get("request") != fingerprint:
                work.clear()
            for name, value in (before.get("parts") or {}).items():
                if parts.get(name) != value:
                    work.of_part(name).remove_latents()
            write_text_atomic(folder / REQUEST, json.dumps({"request": fingerprint, "parts": parts}, indent=1) + "\n")
            try:
                yield work
            finally:
                work.clear(keep_latents=any(folder.glob(f"*{SUFFIX}")))

    def of_part(self, name: str) -> WorkFolder:
        return WorkFolder(self.folder, self.rank, name)

    def read_request(self) -> dict[str, Any]:
        """request.json; empty if there is none, or it is damaged."""
        try:
            request = parse_json(read_regular_file(self.folder / REQUEST, MAX_REQUEST_BYTES))
        except (OSError, ValueError):
            return {}
        return request if isinstance(request, dict) else {}

    def clear(self, keep_latents: bool = False) -> None:
        """Removes what is in it, except for the lock."""
        for path in self.folder.iterdir():
            if path.name == LOCK or (keep_latents and (path.name == REQUEST or path.suffix == SUFFIX)):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def remove_latents(self) -> None:
        """Removes the latents of this part."""
        for path in self.folder.glob(f"{glob.escape(self.part)}window-*{SUFFIX}"):
            path.unlink()

    # ------------------------------------------------------------------ frames

    def store(self, timeline: Timeline) -> FrameStore:
        """Where the frames of a timeline are kept: in memory if they are few, else in a file."""
        shape = (timeline.frames, timeline.height, timeline.width, 3)
        if num_bytes(shape) <= LARGE:
            return FrameStore(timeline)
        return FrameStore(timeline, self.folder / f"{self.part}frames-{self.rank}.npy")

    def allocate(self, shape: tuple[int, ...]) -> np.ndarray:
        """An uint8 array for a given video, in memory if it is small, else in a file."""
        if num_bytes(shape) <= LARGE:
            return np.empty(shape, np.uint8)
        return frames_in_file(self.folder / f"given-{self.rank}.npy", shape)

    # ------------------------------------------------------------------ latents

    def path_of(self, window: int, sampling_pass: int) -> Path:
        return self.folder / f"{self.part}window-{window:05d}-pass-{sampling_pass}{SUFFIX}"

    def get(self, window: int, sampling_pass: int) -> Tensor | None:
        """The latents of a window, patches fp32 [l, P]; None if they were not sampled yet."""
        path = self.path_of(window, sampling_pass)
        if not path.exists():
            return None
        try:
            return load(read_regular_file(path, path.stat().st_size))[LATENTS]
        except (SafetensorError, KeyError, ValueError) as error:
            raise MegaSoraError(f"{path} is damaged ({error}); remove it: its window is sampled again") from None

    def put(self, window: int, sampling_pass: int, patches_LP: Tensor) -> None:
        with atomic_writer(self.path_of(window, sampling_pass)) as file:
            file.write(save({LATENTS: patches_LP.contiguous().to(torch.float32)}))


class SavedLatents:
    """LatentStore of a call of `Sampler.sample`: each timeline has its work folder. `is_writer`: whether this process
    saves them; every process reads them."""

    def __init__(self, folders: Sequence[WorkFolder], is_writer: bool = True):
        self.folders, self.is_writer = folders, is_writer

    def get(self, timeline: int, window: int, sampling_pass: int) -> Tensor | None:
        return self.folders[timeline].get(window, sampling_pass)

    def put(self, timeline: int, window: int, sampling_pass: int, patches_LP: Tensor) -> None:
        if self.is_writer:
            self.folders[timeline].put(window, sampling_pass, patches_LP)


def folder_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.work")


def num_bytes(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def check_space(folder: Path, size: int, what: str) -> None:
    """Raises MegaSoraError if `size` bytes do not fit on the file system of `folder`."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if size + SPARE > free:
        raise MegaSoraError(
            f"{what} need {mebibytes(size)} beside {mebibytes(SPARE)} to spare, {folder} has {mebibytes(free)} free; "
            "give fewer --frames, a smaller --size, or an --out on another file system"
        )


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
