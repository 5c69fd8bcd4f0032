"""`megasora codec encode|decode|export`: a clip to a file of latents and back, and the codec of a run.

    CLIP --encode--> file of latents (latents_file.py) --decode--> CLIP

Frames are padded to whole latents before encoding, and cut to their native size after decoding. They are streamed: a
clip of any length needs the memory of its latents and of one chunk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megasora.checkpoint.safetensors_file import check_new_file
from megasora.codec import build_codec, resolve_codec
from megasora.codec.vae.codec import codec_device
from megasora.codec.vae.folder import task_of
from megasora.codec.vae.weights import is_replaceable
from megasora.commands.latents_file import ClipInfo, read_latents, write_latents
from megasora.config import Config, load, load_run_config
from megasora.data.clip_reader import open_clip
from megasora.data.clip_writer import write_frames, write_image
from megasora.data.media import Media
from megasora.data.media_formats import CLIP_FILES, IMAGE_FORMATS, VIDEO_FORMATS
from megasora.data.padding import pad_frame
from megasora.data.patches import frames_to_uint8
from megasora.errors import MegaSoraError, printable
from megasora.ingest.worker import FrameCounter
from megasora.sampling.outputs import check_output_path

if TYPE_CHECKING:
    from megasora.codec import Codec

SECTIONS = ("codec.", "ingest.")  # of the settings that these commands read
MAX_SHOWN = 60  # characters of a wrong value in a message

# (run folder, its configuration, device, heartbeat(what is being done)) -> the codec folder
ExportCodec = Callable[[Path, Config, torch.device, Callable[[str], None]], Path]


def codec_settings(codec: str, overrides: list[str]) -> Config:
    """The configuration for --codec: dct, a codec folder or run, or with codec.name=NAME a pretrained codec.

    Its factors and channels are those of the codec. Raises MegaSoraError, also for settings of other sections.
    """
    for text in overrides:
        if not text.startswith(SECTIONS):
            raise MegaSoraError(f"override '{printable(text, MAX_SHOWN)}': only codec.* and ingest.* are read here")
        if text.startswith("codec.path="):
            raise MegaSoraError(f"--codec {codec} with {printable(text, MAX_SHOWN)}: give the path as --codec")
    names = [text for text in overrides if text.startswith("codec.name=")]
    if codec == "dct":
        name = [] if names else ["codec.name=dct"]
        config = load(None, [*name, *overrides])
    else:
        name = [] if names else ["codec.name=vae"]
        config = load(None, [*name, f"codec.path={codec}", *overrides])
    config.codec = resolve_codec(config.codec)
    return config


# ---------------------------------------------------------------- encode


def encode_file(clip: Path, codec_path: str, out: Path, overrides: list[str]) -> None:
    """Writes the latents of a clip to `out`. Raises MegaSoraError."""
    check_new_file(out)
    if clip.suffix.lower() not in {**IMAGE_FORMATS, **VIDEO_FORMATS}:
        raise MegaSoraError(f"{clip} is not a clip: give a {CLIP_FILES} file")
    if not clip.is_file():
        raise MegaSoraError(f"{clip} does not exist; give a video or an image")
    config = codec_settings(codec_path, overrides)
    codec = build_codec(config.codec)
    with frame_progress("encode") as advance, open_clip(Media(clip), config.ingest) as opened:
        counter = FrameCounter(counted(opened.frames, advance))
        padded = (pad_frame(frame, codec.factors[1:]) for frame in counter)
        latents = list(codec.encode_frames(padded))
        fps = opened.fps if counter.count > 1 else 0.0
    info = ClipInfo(*counter.size, counter.count, fps)
    shape = write_latents(out, latents, info, codec)
    print(f"{out}  latents {'x'.join(map(str, shape))} of {info}")


def counted(frames: Iterable[np.ndarray], advance: Callable[[], None]) -> Iterator[np.ndarray]:
    """The frames; `advance` is called before each."""
    for frame in frames:
        advance()
        yield frame


# ---------------------------------------------------------------- decode


def decode_file(path: Path, codec_path: str, out: Path, overrides: list[str]) -> None:
    """Writes the clip of a file of latents to `out`, .mp4 or .png. Raises MegaSoraError."""
    check_output_path(out)
    codec = build_codec(codec_settings(codec_path, overrides).codec)
    info, latents = read_latents(path, codec)
    if (info.frames == 1) != (out.suffix == ".png"):
        raise MegaSoraError(f"--out {out}: {path} is {info}; an image is .png, a video .mp4")
    comment = json.dumps({"by": "MegaSora", "codec": codec.fingerprint})
    with frame_progress("decode") as advance:
        frames = decode_frames(codec, latents, info, advance)
        if info.frames == 1:
            write_image(next(frames), out, comment)
            print(f"{out}  {info}")
            return
        even = tuple(n + n % 2 for n in (info.height, info.width))
        write_frames((pad_frame(frame, (2, 2)) for frame in frames), even, info.fps, out, comment)
    padded = f", padded to {even[0]}x{even[1]}: H.264 has even sides" if even != (info.height, info.width) else ""
    print(f"{out}  {info}{padded}")


def decode_frames(
    codec: Codec, latents: np.ndarray, info: ClipInfo, advance: Callable[[], None]
) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] of each frame, at native size. `latents`: [C, T, h, w]."""
    latent_frames = (np.ascontiguousarray(latents[:, t].transpose(1, 2, 0)) for t in range(latents.shape[1]))
    for frame in islice(codec.decode_latents(latent_frames), info.frames):
        advance()
        pixels = torch.from_numpy(frame[: info.height, : info.width]).permute(2, 0, 1)
        yield frames_to_uint8(pixels[None])[0].numpy()


@contextmanager
def frame_progress(label: str) -> Iterator[Callable[[], None]]:
    """Shows the number of frames done if standard error is a terminal; yields a function to call after each."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    console = Console(stderr=True)
    columns: tuple[Any, ...] = (TextColumn(label), SpinnerColumn(), MofNCompleteColumn(), TextColumn("frames"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(label, total=None)
        yield lambda: progress.advance(bar)


# ---------------------------------------------------------------- export


def export_run(run: Path, out: Path | None, export_codec: ExportCodec) -> None:
    """Makes RUN/codec of the newest checkpoint of a codec run, and a copy of it in `out`. Raises MegaSoraError."""
    if not (run / "config.yaml").is_file():
        raise MegaSoraError(f"{run} is not a run folder: it has no config.yaml; give one of megasora.train_codec")
    if task_of(run) != "codec":
        raise MegaSoraError(f"{run} is not a run of megasora.train_codec: it trains no codec")
    if out is not None and out.exists() and not is_replaceable(out):
        raise MegaSoraError(f"--out {out} exists and holds no codec; remove it, or choose another folder")
    config = load_run_config(run)
    folder = export_codec(run, config, codec_device(config.codec.device), lambda _: None)
    if out is not None:
        folder = copy_codec(folder, out)
    print(f"codec in {folder}")


def copy_codec(folder: Path, out: Path) -> Path:
    """Copies a codec folder to `out`, which it returns; nothing half-written is left."""
    staging = out.with_name(f".{out.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        shutil.copytree(folder, staging)
        shutil.rmtree(out, ignore_errors=True)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return out
