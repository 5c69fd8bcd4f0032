"""What the folder of a codec run has beyond that of any run: reconstructions, the finished codec, its evaluation."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megasora.files import read_regular_file
from megasora.observe.figures import finite_or_none
from megasora.observe.formatting import pluralize
from megasora.observe.json_kinds import is_kind, keep_kinds, read_object
from megasora.observe.run_data import RunData, to_float

CODEC = {"mean": list, "std": list, "step": int, "encoder_sha256": str, "decoder_sha256": str, "name": str}
EVALUATION = {"total": dict, "clips": list, "split": str}
MAX_CHANNELS, MAX_CLIPS = 1024, 64  # shown
# pictures and their bytes on the page, bytes of eval/sheet.png; px of a side
MAX_PICTURES, MAX_EMBEDDED, MAX_SHEET, MAX_PIXELS = 24, 10 << 20, 4 << 20, 1 << 14
PICTURE_NAME = re.compile(r"step-(\d{8,12})\.png", re.ASCII)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_HEAD = struct.Struct(">8s8xII")  # signature, length and type of the first chunk, width, height


@dataclass(frozen=True)
class Picture:
    """A picture of RUN/reconstructions/ or eval/: rows of originals, reconstructions and their differences."""

    step: int  # of training; of eval/ that of the codec is not known
    data: bytes
    width: int  # px
    height: int


@dataclass(frozen=True)
class CodecFiles:
    """`codec`: codec/codec.json; `evaluation`: eval/eval.json; {} if there is none. `pictures`: by step. `sheet`:
    eval/sheet.png."""

    codec: dict[str, Any]
    evaluation: dict[str, Any]
    pictures: list[Picture]
    sheet: Picture | None

    @property
    def channel_statistics(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and standard deviation of each latent channel before normalisation, or None."""
        mean, std = (self.codec.get(key, []) for key in ("mean", "std"))
        is_usable = 0 < len(mean) == len(std) <= MAX_CHANNELS and all(is_kind(x, float) for x in [*mean, *std])
        return (np.array(mean, dtype=float), np.array(std, dtype=float)) if is_usable else None


def read_codec_files(run: RunData) -> CodecFiles:
    """Adds to `run.notes` what cannot be shown. Raises MegaSoraError if a JSON file is invalid."""
    codec, evaluation = (read_object(run.folder / name) for name in ("codec/codec.json", "eval/eval.json"))
    pictures = read_pictures(run.folder / "reconstructions", run.notes)
    sheet = read_picture(run.folder / "eval" / "sheet.png", 0, MAX_SHEET)
    return CodecFiles(keep_kinds(codec, CODEC), keep_kinds(evaluation, EVALUATION), pictures, sheet)


def read_pictures(folder: Path, notes: list[str]) -> list[Picture]:
    """At most MAX_PICTURES, evenly over the run, with the first and the newest; the newest have precedence in size."""
    found = sorted((int(m[1]), path) for path in folder.glob("*.png") if (m := PICTURE_NAME.fullmatch(path.name)))
    if len(found) > MAX_PICTURES:
        notes.append(f"reconstructions/ has {len(found)} pictures; {MAX_PICTURES} of them are shown.")
        found = [found[i] for i in np.linspace(0, len(found) - 1, MAX_PICTURES).round().astype(int)]
    pictures, remaining, left_out = [], MAX_EMBEDDED, 0
    for step, path in reversed(found):
        picture = read_picture(path, step, remaining)
        if picture:
            pictures.append(picture)
            remaining -= len(picture.data)
        else:
            left_out += 1
    if left_out:
        notes.append(
            f"reconstructions/: {pluralize(left_out, 'picture')} left out: not a PNG, or more than the "
            f"{MAX_EMBEDDED >> 20} MiB that the page embeds."
        )
    return pictures[::-1]


def read_picture(path: Path, step: int, limit: int) -> Picture | None:
    """None if there is no PNG of at most `limit` bytes and MAX_PIXELS."""
    try:
        data = read_regular_file(path, limit)
        signature, width, height = PNG_HEAD.unpack_from(data)
    except (OSError, struct.error):
        return None
    is_shown = signature == PNG_SIGNATURE and 0 < width <= MAX_PIXELS and 0 < height <= MAX_PIXELS
    return Picture(step, data, width, height) if is_shown else None


def compute_codec_figures(run: RunData, files: CodecFiles) -> dict[str, Any]:
    """The headline figures, as report.json holds them: Python numbers, None where the run has no such figure."""
    speed, evaluated = run.metrics["clips_per_second"], files.evaluation.get("total", {})
    figures: dict[str, Any] = {"steps": int(run.steps[-1])}
    for key, name in (("loss", "val_loss"), ("psnr", "psnr"), ("ssim", "ssim"), ("flicker", "flicker")):
        values = [to_float(line.get(key)) for line in run.validations] or [math.nan]
        figures |= {f"first_{name}": finite_or_none(values[0]), f"final_{name}": finite_or_none(values[-1])}
    return figures | {
        "codebook_use": codebook_use(run),
        "compression": compression(run),
        "clips_per_second": finite_or_none(np.nanmedian(speed)) if np.isfinite(speed).any() else None,
        **{f"eval_{key}": finite_or_none(evaluated.get(key)) for key in ("psnr", "ssim", "flicker")},
    }


def num_codes(run: RunData) -> int | None:
    """Codes of the codebook; None for latents that are not quantized."""
    kind = run.config.get("vae.kind")
    codes = {"vq": run.config.get("vae.codebook_size"), "fsq": math.prod(run.config.get("vae.fsq_levels") or [])}
    return codes.get(kind)


def codebook_use(run: RunData) -> float | None:
    """The last perplexity, of validations if they have it, as a fraction of the codes."""
    codes = num_codes(run)
    values = [to_float(line.get("perplexity")) for line in run.validations]
    values = [value for value in values or run.metrics["perplexity"] if math.isfinite(value)]
    return values[-1] / codes if codes and values else None


def compression(run: RunData) -> float:
    """Numbers of a block of pixels / numbers of its latent."""
    return 3 * math.prod(run.config["codec.factors"]) / run.config["codec.channels"]
