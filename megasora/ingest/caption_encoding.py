"""Checks and encodes captions before their clips are decoded: a clip without a usable caption is never decoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megasora.config import Config
from megasora.errors import MegaSoraError
from megasora.ingest.listing import ClipSource
from megasora.ingest.results import Rejection

if TYPE_CHECKING:
    from megasora.text.bytes import BytesEncoder
    from megasora.text.pretrained import PretrainedEncoder

    TextEncoder = BytesEncoder | PretrainedEncoder

CAPTION_BATCH = 32  # captions of one block in one call of the encoder; batches do not depend on the parts of an ingest


@dataclass(frozen=True)
class PreparedClip:
    """A clip with its encoded caption, ready to be decoded; or with the rejection of its caption."""

    sample_id: int
    source: ClipSource
    patch_path: Path  # file that its patches are written to
    text: Tensor | None = None  # [S, E]
    rejection: Rejection | None = None


def check_captions(clips: list[ClipSource], config: Config) -> None:
    """Raises MegaSoraError if clips have no caption and `ingest.missing_caption=error`."""
    uncaptioned = [clip for clip in clips if not clip.caption and not clip.caption_rejection]
    if uncaptioned and config.ingest.missing_caption == "error":
        media = uncaptioned[0].media
        remedy = "give it one" if media.name else f"write {media.path.with_suffix('.txt').name} beside it"
        raise MegaSoraError(
            f"{media} has no caption ({len(uncaptioned)} of {len(clips)} clips have none): {remedy}, or set "
            "ingest.missing_caption=skip or =empty"
        )


def prepare_block(
    sample_ids: range, clips: list[ClipSource], patch_dir: Path, config: Config, encoder: TextEncoder
) -> Iterator[PreparedClip]:
    """The clips of one block in order, their captions encoded in batches. `patch_dir`: folder for their patches."""
    for start in range(0, len(sample_ids), CAPTION_BATCH):
        batch = sample_ids[start : start + CAPTION_BATCH]
        rejections = {sample_id: caption_rejection(clips[sample_id], config) for sample_id in batch}
        accepted = [sample_id for sample_id in batch if rejections[sample_id] is None]
        features = encode_captions(encoder, [clips[sample_id].caption or "" for sample_id in accepted])
        texts = dict(zip(accepted, features, strict=True))
        for sample_id in batch:
            source, text = clips[sample_id], texts.get(sample_id)
            rejection = rejections[sample_id] or encoding_rejection(source, text, encoder.precomputed)
            patch_path = patch_dir / str(sample_id)
            yield PreparedClip(sample_id, source, patch_path, None if rejection else text, rejection)


def caption_rejection(clip: ClipSource, config: Config) -> Rejection | None:
    """Why a clip has no caption to encode, or None."""
    if clip.caption_rejection:
        return clip.caption_rejection
    if not clip.caption and config.ingest.missing_caption == "skip":
        return Rejection("caption", "no caption", f"{clip.media} has no caption")
    return None


def encoding_rejection(clip: ClipSource, text: Tensor | MegaSoraError, precomputed: bool) -> Rejection | None:
    """Why an encoded caption cannot be stored, or None."""
    if isinstance(text, MegaSoraError):
        return Rejection("caption", "caption too long", f"{clip.media}: {text}")
    if precomputed and not torch.isfinite(text.half()).all():
        message = f"{clip.media}: features of its caption are not finite in float16"
        return Rejection("caption", "features not finite", message)
    return None


def encode_captions(encoder: TextEncoder, captions: list[str]) -> list[Tensor | MegaSoraError]:
    """The encoding of each caption, or the encoder's error for it.

    An encoder raises for the whole batch, so a batch that fails is halved until the captions at fault are alone.
    """
    if not captions:
        return []
    try:
        return encoder.encode(captions)
    except MegaSoraError as error:
        if len(captions) == 1:
            return [error]
    middle = len(captions) // 2
    return encode_captions(encoder, captions[:middle]) + encode_captions(encoder, captions[middle:])
