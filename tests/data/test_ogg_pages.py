"""Ogg files: pages that are cut or changed are noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megasora.config import IngestConfig
from megasora.data.clip_reader import read_clip
from megasora.data.media import ByteWindow, RejectedClip
from megasora.data.ogg_pages import checksum, ogg_damage
from megasora.testing.video_files import Encoding, encode_video, gradient

FRAMES = 6


def pages_of(data: bytes) -> list[bytes]:
    starts = [i for i in range(len(data)) if data[i : i + 5] == b"OggS\0"]
    return [data[start:stop] for start, stop in zip(starts, [*starts[1:], len(data)], strict=True)]


def with_checksum(page: bytes) -> bytes:
    page = page[:22] + bytes(4) + page[26:]
    return page[:22] + checksum(page).to_bytes(4, "little") + page[26:]


@pytest.fixture
def video(tmp_path) -> Path:
    """VP8 with one frame in each page."""
    how = Encoding(
        codec="libvpx", container="ogg", options={"crf": "5", "b": "2M"}, muxer_options={"page_duration": "1"}
    )
    return encode_video(tmp_path / "a.ogv", gradient(FRAMES, 32, 48), 12, how)


def damage(path: Path) -> str:
    with open(path, "rb", buffering=0) as file:
        return ogg_damage(ByteWindow(file, 0, None))


def test_the_checksum_is_that_of_the_muxer(video):
    pages = pages_of(video.read_bytes())
    assert len(pages) >= FRAMES
    assert [with_checksum(page) for page in pages] == pages
    assert checksum(b"123456789") == 0x89A1897F  # polynomial 0x04C11DB7, from 0, no inversions


def test_a_whole_file_has_no_damage_and_bytes_after_its_end_are_ignored(video):
    assert damage(video) == ""
    video.write_bytes(video.read_bytes() + b"TAG of a music player")
    assert damage(video) == ""
    assert len(read_clip(video, IngestConfig()).frames_FHWC) == FRAMES


@pytest.mark.parametrize("fraction", np.linspace(0.05, 0.95, 10).round(2))
def test_cut_files_are_truncated(fraction, video):
    data = video.read_bytes()
    video.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(RejectedClip, match="ends within a page, which starts at byte") as error_info:
        read_clip(video, IngestConfig())
    assert error_info.value.reason == "truncated"


def test_every_changed_byte_is_noticed(video):
    data = video.read_bytes()
    for position in range(0, len(data), 7):
        changed = bytearray(data)
        changed[position] ^= 1
        video.write_bytes(changed)
        assert damage(video)
