"""A file is read as what its first bytes say; every format that is listed is read."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from megasora.config import IngestConfig
from megasora.data.clip_reader import read_clip
from megasora.data.media import RejectedClip
from megasora.data.media_formats import (
    FFMPEG_NAMES,
    FIRST_BYTES,
    IMAGE_FORMATS,
    PILLOW_NAMES,
    VIDEO_FORMATS,
    real_format,
    with_article,
)

LIMITS = IngestConfig()
CODEC_ERROR = 2.5  # grey levels, mean over a frame


def gradient(frames: int) -> np.ndarray:
    """Smooth frames of 48x64: red increases to the right, green downwards, blue by 15 levels per frame."""
    y, x = np.mgrid[0:48, 0:64]
    layers = [[x * 200 // 64, y * 200 // 48, np.full_like(x, 20 + i * 15)] for i in range(frames)]
    return np.array(layers).transpose(0, 2, 3, 1).astype(np.uint8)


def write_video(path: Path, frames: np.ndarray, container: str, codec: str, options: dict | None = None) -> Path:
    with av.open(str(path), "w", format=container, options=options or {}) as file:
        stream = file.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = *frames.shape[1:3], "yuv420p", 4_000_000
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))
    return path


VIDEOS = {  # file -> real format, container, codec, options of the container
    "a.mp4": ("MP4", "mp4", "libx264", {}),
    "a.m4v": ("MP4", "mp4", "mpeg4", {}),
    "a.3gp": ("3GP", "3gp", "libx264", {}),
    "a.mov": ("MOV", "mov", "libx264", {}),
    "a.mkv": ("Matroska", "matroska", "ffv1", {}),
    "a.webm": ("WebM", "webm", "libvpx", {}),
    "a.avi": ("AVI", "avi", "mpeg4", {}),
    "a.ts": ("MPEG-TS", "mpegts", "libx264", {}),
    "a.mts": ("MPEG-TS", "mpegts", "mpeg2video", {}),
    "a.m2ts": ("MPEG-TS", "mpegts", "libx264", {"mpegts_m2ts_mode": "1"}),
    "a.mpg": ("MPEG-PS", "vob", "mpeg2video", {}),
    "a.mpeg": ("MPEG-PS", "mpeg", "mpeg1video", {}),
    "a.flv": ("FLV", "flv", "flv", {}),
    "a.wmv": ("ASF", "asf", "wmv2", {}),
    "a.ogv": ("Ogg", "ogg", "libvpx", {}),
}
IMAGES = {  # file -> real format, options, error in grey levels
    "a.png": ("PNG", {}, 0),
    "a.apng": ("PNG", {"format": "PNG"}, 0),
    "a.jpg": ("JPEG", {"quality": 98}, 3),
    "a.jpeg": ("JPEG", {"quality": 98}, 3),
    "a.webp": ("WebP", {"lossless": True}, 0),
    "a.gif": ("GIF", {}, 8),
    "a.bmp": ("BMP", {}, 0),
    "a.tif": ("TIFF", {}, 0),
    "a.tiff": ("TIFF", {"compression": "tiff_lzw"}, 0),
    "a.avif": ("AVIF", {"quality": 98}, 3),
}


def test_the_examples_here_are_all_suffixes_and_formats():
    assert {Path(name).suffix for name in VIDEOS} == set(VIDEO_FORMATS)
    assert {Path(name).suffix for name in IMAGES} == set(IMAGE_FORMATS)
    assert {real for real, *_ in VIDEOS.values()} == set(FFMPEG_NAMES)
    assert {real for real, *_ in IMAGES.values()} == set(PILLOW_NAMES)


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_of_every_suffix_are_read_whole_and_recognized(name, tmp_path):
    real, container, codec, options = VIDEOS[name]
    path = write_video(tmp_path / name, made := gradient(9), container, codec, options)
    clip = read_clip(path, LIMITS)
    assert clip.frames_FHWC.shape == made.shape and clip.fps == 25.0
    assert np.abs(clip.frames_FHWC.astype(float) - made).mean((1, 2, 3)).max() < CODEC_ERROR
    assert real_format(path.read_bytes()[:FIRST_BYTES]) == real


@pytest.mark.parametrize("name", IMAGES)
def test_images_of_every_suffix_are_read_and_recognized(name, tmp_path):
    real, options, error = IMAGES[name]
    Image.fromarray(made := gradient(1)[0]).save(tmp_path / name, **options)
    clip = read_clip(tmp_path / name, LIMITS)
    assert clip.fps == 0.0 and clip.frames_FHWC.shape == (1, 48, 64, 3)
    assert np.abs(clip.frames_FHWC[0].astype(float) - made).mean() <= error
    assert real_format((tmp_path / name).read_bytes()[:FIRST_BYTES]) == real


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".mp4"])
def test_an_image_with_the_suffix_of_another_format_is_read_as_what_it_is(suffix, tmp_path):
    Image.fromarray(made := gradient(1)[0]).save(tmp_path / f"a{suffix}", format="WEBP", lossless=True)
    assert np.array_equal(read_clip(tmp_path / f"a{suffix}", LIMITS).frames_FHWC[0], made)


@pytest.mark.parametrize("suffix", [".gif", ".jpg", ".webm", ".mkv", ".avi"])
def test_a_video_with_the_suffix_of_another_format_is_read_as_what_it_is(suffix, tmp_path):
    write_video(tmp_path / f"a{suffix}", gradient(9), "mp4", "libx264")
    clip = read_clip(tmp_path / f"a{suffix}", LIMITS)
    assert len(clip.frames_FHWC) == 9 and clip.fps == 25.0


HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(200)
OTHERS = {  # what a file is -> its bytes
    "an HTML file": b"\n<!DOCTYPE html><html><head><title>404 Not Found</title>",
    "an XML file": b"\xef\xbb\xbf<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'></svg>",
    "a text file": "Файл не найден\n".encode() * 100,
    "a Git LFS pointer file": b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n",
    "an HEIC file": HEIC,
    "a ZIP file": b"PK\x03\x04" + bytes(100),
    "a PDF file": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "a JPEG XL file": b"\xff\x0a" + bytes(100),
    "a PSD file": b"8BPS\0\1" + bytes(100),
    "a WAV file": b"RIFF\x24\0\0\0WAVEfmt " + bytes(100),
    "an MP3 file": b"ID3\x04\0\0" + bytes(100),
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("suffix", [".mp4", ".jpg"])
def test_a_file_of_a_format_that_is_not_read_is_named(what, suffix, tmp_path):
    (tmp_path / f"a{suffix}").write_bytes(OTHERS[what])
    with pytest.raises(RejectedClip) as error_info:
        read_clip(tmp_path / f"a{suffix}", LIMITS)
    assert error_info.value.reason == "wrong suffix"
    assert f"a{suffix} is {what} named {suffix}" in str(error_info.value)


@pytest.mark.parametrize("suffix", IMAGE_FORMATS)
def test_bytes_of_no_known_format_are_rejected_without_the_address_of_an_object(suffix, tmp_path):
    (tmp_path / f"a{suffix}").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(RejectedClip) as error_info:
        read_clip(tmp_path / f"a{suffix}", LIMITS)
    assert error_info.value.reason == "unreadable" and "0x" not in str(error_info.value)


def test_names_of_formats_have_the_article_that_is_spoken():
    names = ["MP4", "MOV", "AVI", "HTML", "MPEG-TS", "FLV", "ASF", "WebP", "GIF", "JPEG", "PNG", "text", "Ogg", "TIFF"]
    articles = [with_article(name).split()[0] for name in names]
    assert articles == ["an"] * 7 + ["a"] * 5 + ["an", "a"]


def test_real_formats_that_first_bytes_do_not_show_are_unknown():
    assert real_format(b"") is None
    assert real_format(bytes(1024)) is None
    noise = io.BytesIO(np.random.default_rng(1).bytes(1 << 20))
    assert {real_format(noise.read(1024)) for _ in range(1024)} == {None}
