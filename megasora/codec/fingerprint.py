"""The part of a fingerprint that says how frames larger than a tile are divided."""

from __future__ import annotations

from megasora.config import CodecConfig

MARK = "-tile"


def tile_suffix(config: CodecConfig) -> str:
    """The end of the fingerprint of a codec with tiles; "" if frames are not divided."""
    tile = config.tile
    return f"{MARK}{tile[0]}x{tile[1]}-{config.tile_overlap}" if any(tile) else ""


def without_tiles(fingerprint: str) -> str:
    """What two codecs have in common that differ in their tiles only: each decodes the latents of the other."""
    return fingerprint.partition(MARK)[0]
