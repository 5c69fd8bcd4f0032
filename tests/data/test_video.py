"""Clips of every supported format are decoded whole, at native size; all others are rejected with a reason."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from megasora.config import IngestConfig, load
from megasora.data.clip_reader import open_clip, read_clip
from megasora.data.clip_writer import write_image, write_video
from megasora.data.folder import open_folder
from megasora.data.media import Media, RejectedClip, sha256
from megasora.data.shard_reader import ShardSplit
from megasora.data.verify import verify
from megasora.ingest import ingest
from megasora.ingest.file_roles import is_clip_name
from megasora.testing.video_files import Encoding, encode_video, gradient

CODEC_ERROR = 2.5  # grey levels, mean over a frame; two neighbouring frames of `gradient` are 6.7 apart
LIMITS = IngestConfig()


def noise(frames: int, height: int, width: int) -> np.ndarray:
    """Frames that cannot be compressed, so that cutting the file cuts its frames."""
    return np.random.default_rng(0).integers(0, 255, (frames, height, width, 3), dtype=np.uint8)


def encode(
    path: Path, frames: np.ndarray, rate=12, codec="libx264", container="mp4", pixels="yuv420p", options=None, mux=None
) -> Path:
    how = Encoding(codec=codec, container=container, pixels=pixels, options=options or {}, muxer_options=mux or {})
    return encode_video(path, frames, rate, how)


def cut(path: Path, fraction: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])
    return path


def error_by_frame(read: np.ndarray, made: np.ndarray) -> np.ndarray:
    assert read.shape == made.shape and read.dtype == np.uint8
    return np.abs(read.astype(float) - made).mean((1, 2, 3))


NTSC, FILM = Fraction(30_000, 1001), Fraction(24_000, 1001)
FINE = {"crf": "5"}
KINDS = {  # file -> (height, width), frame rate, how it is encoded
    "even.mp4": ((32, 48), NTSC, dict(options=FINE)),
    "odd.mp4": ((31, 47), FILM, dict(options=FINE, pixels="yuv444p")),
    "tall.MP4": ((48, 24), Fraction(8), dict(options=FINE)),
    "lossless.m4v": ((32, 48), Fraction(12), dict(codec="libx264rgb", pixels="rgb24", options={"qp": "0"})),
    "quick.mov": ((32, 48), NTSC, dict(options=FINE, container="mov")),
    "h264.mkv": ((30, 48), FILM, dict(options=FINE, container="matroska")),
    "vp9.webm": ((32, 48), Fraction(24), dict(codec="libvpx-vp9", container="webm", options=FINE)),
    "mpeg4.avi": ((32, 48), Fraction(25), dict(codec="mpeg4", container="avi", options={"qmax": "2"})),
    "pieces.mp4": ((32, 48), Fraction(16), dict(options=FINE, mux={"movflags": "frag_keyframe+empty_moov"})),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_is_decoded_at_native_size_in_order_and_with_its_rate(name, tmp_path):
    size, rate, how = KINDS[name]
    made = gradient(9, *size)
    clip = read_clip(encode(tmp_path / name, made, rate, **how), LIMITS)
    assert error_by_frame(clip.frames_FHWC, made).max() < CODEC_ERROR
    assert clip.fps == float(rate)


def test_lossless_h264_is_decoded_to_the_same_pixels(tmp_path):
    made = noise(5, 31, 47)
    path = encode(tmp_path / "a.mp4", made, codec="libx264rgb", pixels="rgb24", options={"qp": "0"})
    assert np.array_equal(read_clip(path, LIMITS).frames_FHWC, made)


@pytest.mark.parametrize(("suffix", "error"), [(".png", 0), (".jpg", 3), (".jpeg", 3), (".webp", 3)])
def test_an_image_is_a_clip_of_one_frame_without_a_rate(suffix, error, tmp_path):
    made = gradient(1, 31, 47)
    Image.fromarray(made[0]).save(tmp_path / f"a{suffix}", quality=100)
    clip = read_clip(tmp_path / f"a{suffix}", LIMITS)
    assert error_by_frame(clip.frames_FHWC, made).max() <= error
    assert clip.fps == 0.0


def test_grey_and_palette_images_become_three_colours(tmp_path):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "palette.png")
    for name in ("grey.png", "palette.png"):
        assert np.array_equal(read_clip(tmp_path / name, LIMITS).frames_FHWC, grey[None, :, :, None].repeat(3, 3))


def test_a_video_of_one_frame_is_an_image_and_has_no_rate(tmp_path):
    clip = read_clip(encode(tmp_path / "a.mp4", gradient(1, 32, 48), options=FINE), LIMITS)
    assert len(clip.frames_FHWC) == 1 and clip.fps == 0.0


@pytest.mark.parametrize("key_frames_every", [30, 4])  # 4: the first four frames are not even read
def test_a_clip_cut_without_reencoding_has_the_frames_that_a_player_shows(key_frames_every, tmp_path):
    """As with `-ss ... -c copy`: the file has 12 frames, and an edit list hides those before the cut."""
    made = gradient(12, 32, 48)
    encode(tmp_path / "whole.mp4", made, options={**FINE, "g": str(key_frames_every), "bf": "0", "sc_threshold": "0"})
    with av.open(str(tmp_path / "whole.mp4")) as source, av.open(str(tmp_path / "part.mp4"), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                earlier = int(6 / 12 / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - earlier, packet.dts - earlier, copy
                target.mux(packet)
    clip = read_clip(tmp_path / "part.mp4", LIMITS)
    assert error_by_frame(clip.frames_FHWC, made[6:]).max() < CODEC_ERROR


# ---------------------------------------------------------------- rejections


def text_as_video(folder: Path) -> Path:
    (folder / "a.mp4").write_text("Dear diary,\nthis is no video.\n" * 50)
    return folder / "a.mp4"


def list_of_files(folder: Path) -> Path:
    """A list that a guessing demuxer follows to another file."""
    encode(folder / "secret.mp4", gradient(9, 32, 48))
    (folder / "a.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    with av.open(str(folder / "a.mp4")) as guessed:
        assert sum(1 for _ in guessed.decode(video=0)) == 9
    return folder / "a.mp4"


def zero_bytes(folder: Path) -> Path:
    (folder / "a.mp4").touch()
    return folder / "a.mp4"


def audio_only(folder: Path) -> Path:
    with av.open(str(folder / "a.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=8000, layout="mono")
        for _ in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return folder / "a.mp4"


def codec_of_the_future(folder: Path) -> Path:
    path = encode(folder / "a.mp4", gradient(3, 32, 48))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"avc9"))
    return path


def cut_with_index_at_end(folder: Path) -> Path:
    return cut(encode(folder / "a.mp4", noise(30, 48, 64)), 0.6)


def cut_with_index_in_front(folder: Path) -> Path:
    return cut(encode(folder / "a.mp4", noise(30, 48, 64), mux={"movflags": "+faststart"}), 0.6)


def cut_before_frame(folder: Path, number: int) -> Path:
    path = encode(folder / "a.mp4", noise(30, 48, 64), options={"bf": "0"}, mux={"movflags": "+faststart"})
    with av.open(str(path)) as file:
        starts = sorted(packet.pos for packet in file.demux(video=0) if packet.size)
    path.write_bytes(path.read_bytes()[: starts[number]])
    return path


def cut_between_two_frames(folder: Path) -> Path:
    return cut_before_frame(folder, 20)


def cut_before_the_last_frame(folder: Path) -> Path:
    return cut_before_frame(folder, 29)


def cut_matroska(folder: Path) -> Path:
    return cut(encode(folder / "a.mkv", noise(30, 48, 64), container="matroska"), 0.6)


def cut_webm(folder: Path) -> Path:
    return cut(encode(folder / "a.webm", noise(30, 48, 64), codec="libvpx-vp9", container="webm"), 0.6)


def cut_pieces(folder: Path) -> Path:
    pieces = {"movflags": "frag_keyframe+empty_moov"}
    return cut(encode(folder / "a.mp4", noise(30, 48, 64), options={"g": "10"}, mux=pieces), 0.6)


def cut_image(folder: Path) -> Path:
    Image.fromarray(noise(1, 48, 64)[0]).save(folder / "a.png")
    return cut(folder / "a.png", 0.6)


def no_index(folder: Path) -> Path:
    path = encode(folder / "a.mp4", gradient(3, 32, 48))
    path.write_bytes(path.read_bytes().replace(b"moov", b"nope"))
    return path


def no_frame(folder: Path) -> Path:
    """An mp4 whose index has a video track without a single sample."""
    with av.open(str(folder / "a.mp4"), "w", options={"movflags": "empty_moov+frag_keyframe"}) as file:
        stream = file.add_stream("libx264", rate=12)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        file.start_encoding()
    assert b"moov" in (folder / "a.mp4").read_bytes()
    return folder / "a.mp4"


def of_16k(folder: Path) -> Path:
    return encode(folder / "a.mp4", np.zeros((1, 16384, 16, 3), np.uint8))


def hole_in_a_frame(folder: Path) -> Path:
    path = encode(folder / "a.mp4", noise(12, 48, 64), options={"crf": "30"})
    data, start, end = frames_region(path)
    middle = (start + end) // 2
    path.write_bytes(data[:middle] + bytes(1024) + data[middle + 1024 :])
    return path


def whole(folder: Path) -> Path:
    return encode(folder / "a.mp4", gradient(9, 32, 48))


def whole_image(folder: Path) -> Path:
    Image.fromarray(gradient(1, 32, 48)[0]).save(folder / "a.png")
    return folder / "a.png"


def without_a_frame_count(folder: Path) -> Path:
    return encode(folder / "a.mkv", gradient(9, 32, 48), container="matroska")


REJECTIONS: list[tuple[Callable[[Path], Path], dict, str, list[str]]] = [
    (text_as_video, {}, "wrong suffix", ["is a text file named .mp4"]),
    (list_of_files, {}, "wrong suffix", ["is a text file named .mp4"]),
    (zero_bytes, {}, "empty file", ["0 bytes"]),
    (audio_only, {}, "no video stream", ["no video stream"]),
    (codec_of_the_future, {}, "unknown codec", ["no decoder"]),
    (no_index, {}, "unreadable", ["cannot be decoded"]),
    (no_frame, {}, "no frames", ["has no frame"]),
    (of_16k, {}, "too large", ["16384x16 pixels", "ingest.max_height=4320"]),
    (cut_with_index_at_end, {}, "unreadable", ["cannot be decoded"]),
    (cut_with_index_in_front, {}, "truncated", ["ends within a frame", "of 30"]),
    (cut_between_two_frames, {}, "truncated", ["declares 30 frames, has 20"]),
    (cut_before_the_last_frame, {}, "truncated", ["declares 30 frames, has 29"]),
    (cut_matroska, {}, "truncated", ["declares 2.50 seconds"]),
    (cut_webm, {}, "truncated", ["declares 2.50 seconds"]),
    (cut_pieces, {}, "truncated", ["ends within a frame"]),
    (cut_image, {}, "unreadable", ["not a readable image"]),
    (whole, {"max_height": 31}, "too large", ["32x48", "ingest.max_height=31"]),
    (whole, {"max_width": 47}, "too large", ["32x48", "ingest.max_width=47"]),
    (whole_image, {"max_width": 47}, "too large", ["32x48", "ingest.max_width=47"]),
    (whole, {"max_frames": 8}, "too long", ["9 frames", "ingest.max_frames=8"]),
    (without_a_frame_count, {"max_frames": 8}, "too long", ["9 frames", "ingest.max_frames=8"]),
]


@pytest.mark.parametrize(("make", "limits", "reason", "words"), REJECTIONS, ids=lambda v: getattr(v, "__name__", None))
def test_incomplete_clips_and_those_beyond_the_limits_are_rejected_with_a_reason(make, limits, reason, words, tmp_path):
    path = make(tmp_path)
    with pytest.raises(RejectedClip) as error_info:
        read_clip(path, IngestConfig(**limits))
    assert error_info.value.reason == reason
    message = str(error_info.value)
    for word in [str(path), *words]:
        assert word in message
    assert "0x" not in message and " object at " not in message


def test_an_ingest_rejects_each_bad_clip_alone_and_counts_it_by_its_reason(tmp_path):
    """The two good clips among the bad ones are in the shards, with their own sample ids."""
    bad = [make for make, limits, *_ in REJECTIONS if not limits] + [hole_in_a_frame]
    reasons = Counter(reason for _, limits, reason, _ in REJECTIONS if not limits)
    clips = tmp_path / "clips"
    for number, make in enumerate(bad, 1):
        (tmp_path / make.__name__).mkdir()
        path = make(tmp_path / make.__name__)
        clips.mkdir(exist_ok=True)
        path.rename(clips / f"{number:02d} {make.__name__}{path.suffix}")
    encode(clips / "00 first.mp4", gradient(9, 32, 48))
    encode(clips / f"{len(bad) + 1} last.mp4", gradient(5, 48, 32))
    manifest = ingest(clips, tmp_path / "out", load(None, ["ingest.workers=2", "ingest.missing_caption=empty"]))
    found = Counter(manifest.rejected)
    found.subtract(reasons)
    (hole,) = +found
    assert hole in ("damaged", "unreadable", "truncated") and found.total() == 1 and not -found
    shards = ShardSplit.open(tmp_path / "out", "train")
    assert shards.index.sample_ids.tolist() == [0, len(bad) + 1]
    assert [(e.native_size[2], e.grid) for e in shards.index] == [(9.0, (3, 4, 6)), (5.0, (2, 6, 4))]
    assert list(verify(open_folder(tmp_path / "out"))) == []


@pytest.mark.parametrize("make", [whole, without_a_frame_count])
def test_the_limits_are_the_last_values_that_pass(make, tmp_path):
    limits = IngestConfig(max_height=32, max_width=48, max_frames=9)
    assert len(read_clip(make(tmp_path), limits).frames_FHWC) == 9


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_clip_too_large_for_memory_is_rejected_before_it_is_decoded(container, tmp_path):
    made = np.zeros((12, 256, 512, 3), np.uint8)  # 4.5 MiB decoded
    path = encode(tmp_path / ("a.mp4" if container == "mp4" else "a.mkv"), made, container=container)
    assert len(read_clip(path, IngestConfig(max_clip_mib=5)).frames_FHWC) == 12
    with pytest.raises(RejectedClip, match="ingest.max_clip_mib=4") as error_info:
        read_clip(path, IngestConfig(max_clip_mib=4))
    assert error_info.value.reason == "too many pixels"


def test_a_file_name_is_never_taken_for_a_protocol(tmp_path, monkeypatch):
    encode(tmp_path / "secret.mp4", gradient(9, 32, 48))
    encode(tmp_path / "concat:secret.mp4", gradient(3, 16, 16))
    monkeypatch.chdir(tmp_path)
    assert read_clip(Path("concat:secret.mp4"), LIMITS).frames_FHWC.shape == (3, 16, 16, 3)
    write_video(gradient(3, 16, 16), 8, Path("part 1: red.mp4"))
    assert read_clip(Path("part 1: red.mp4"), LIMITS).frames_FHWC.shape == (3, 16, 16, 3)


def test_clips_are_recognised_by_their_suffix():
    assert all(is_clip_name(f"a.{s}") for s in "mp4 m4v mov mkv webm avi png jpg jpeg webp MP4 Jpg".split())
    assert not any(is_clip_name(name) for name in ("a.txt", "a.json", "a.m3u8", "mp4", "a.mp4.txt"))


# ---------------------------------------------------------------- writing


def test_a_written_video_plays_in_browsers_and_has_its_comment(tmp_path):
    made, path = gradient(9, 32, 48), tmp_path / "a.mp4"
    comment = json.dumps({"ai_generated": True, "prompt": "ein roter Kreis — 红色"})
    write_video(made, 12.5, path, comment)
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.frames) == (Fraction(25, 2), 9)
        assert file.metadata["comment"] == comment
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays before it is loaded
    assert error_by_frame(read_clip(path, LIMITS).frames_FHWC, made).max() < CODEC_ERROR
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_a_video_can_be_written_losslessly(tmp_path):
    write_video(noise(5, 30, 46), 12, tmp_path / "a.mp4", codec="libx264rgb")
    assert np.array_equal(read_clip(tmp_path / "a.mp4", LIMITS).frames_FHWC, noise(5, 30, 46))


def test_the_same_frames_make_the_same_bytes(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_video(noise(9, 32, 48), 12, tmp_path / name, "comment")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    write_video(noise(9, 32, 48)[::-1], 12, tmp_path / "b.mp4", "comment")
    assert (tmp_path / "a.mp4").read_bytes() != (tmp_path / "b.mp4").read_bytes()


class FailingFrames(np.ndarray):
    """Frames whose iteration ends in an error."""

    def __iter__(self):
        yield from np.asarray(self)
        raise OSError("no more frames")


def test_a_video_that_cannot_be_encoded_leaves_the_folder_unchanged(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"the one before")
    with pytest.raises(av.error.FFmpegError):
        write_video(gradient(3, 31, 47), 12, tmp_path / "a.mp4")  # H.264 4:2:0 has even sides
    with pytest.raises(OSError, match="no more frames"):
        write_video(noise(200, 32, 48).view(FailingFrames), 12, tmp_path / "a.mp4")
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"the one before"


def test_a_written_image_has_the_same_pixels_and_its_comment(tmp_path):
    pixels = noise(1, 31, 47)[0]
    write_image(pixels, tmp_path / "a.png", "generated")
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.array(image), pixels)
        assert image.text["Comment"] == "generated"
    with pytest.raises(TypeError):
        write_image(pixels[..., 0].astype(np.complex64), tmp_path / "b.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


# ---------------------------------------------------------------- orientation


def shown(path: Path, **limits) -> np.ndarray:
    return read_clip(path, IngestConfig(**limits)).frames_FHWC


def with_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Sets the display matrix of a track: pixel (x, y) is displayed at (a x + c y, b x + d y)."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    data[start : start + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


ORIENTATIONS = {  # display matrix -> what a player does to [H, W]
    (1, 0, 0, 1): lambda x: x,
    (0, 1, -1, 0): lambda x: np.rot90(x, -1),  # a phone held upright: a quarter clockwise
    (-1, 0, 0, -1): lambda x: np.rot90(x, 2),
    (0, -1, 1, 0): lambda x: np.rot90(x, 1),
    (-1, 0, 0, 1): lambda x: x[:, ::-1],
    (1, 0, 0, -1): lambda x: x[::-1],
    (0, 1, 1, 0): lambda x: x.swapaxes(0, 1),
    (0, -1, -1, 0): lambda x: np.rot90(x, 2).swapaxes(0, 1),
}


@pytest.mark.parametrize("matrix", ORIENTATIONS, ids=str)
def test_a_rotated_or_mirrored_clip_is_decoded_as_a_player_shows_it(matrix, tmp_path):
    made = noise(2, 16, 24)
    path = encode(tmp_path / "a.mp4", made, codec="libx264rgb", pixels="rgb24", options={"qp": "0"})
    expected = np.stack([ORIENTATIONS[matrix](frame) for frame in made])
    assert np.array_equal(shown(with_display_matrix(path, *matrix)), expected)


def test_the_rotation_is_that_of_the_container_library(tmp_path):
    path = encode(tmp_path / "a.mp4", gradient(2, 16, 24))
    with av.open(str(path)) as source, av.open(str(tmp_path / "b.mp4"), "w") as target:
        copy = target.add_stream_from_template(source.streams.video[0])
        copy.set_display_rotation(-90)  # counter-clockwise
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = copy
                target.mux(packet)
    assert np.array_equal(shown(tmp_path / "b.mp4"), np.rot90(shown(path), -1, (1, 2)))


def test_a_clip_displayed_at_an_angle_is_rejected(tmp_path):
    path = with_display_matrix(encode(tmp_path / "a.mp4", gradient(2, 16, 24)), 1, 1, -1, 1)
    with pytest.raises(RejectedClip, match="only quarter turns are") as error_info:
        read_clip(path, LIMITS)
    assert error_info.value.reason == "tilted"


def test_an_image_is_rotated_as_its_exif_says(tmp_path):
    pixels = gradient(1, 16, 24)[0]
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter clockwise
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(shown(tmp_path / "a.png")[0], np.rot90(pixels, -1))


# ---------------------------------------------------------------- parts of a file, rate and size


def excerpt(path: Path, start: float = 0.0, end: float | None = None, **limits) -> np.ndarray:
    with open_clip(Media(path, start=start, end=end), IngestConfig(**limits)) as clip:
        return np.stack(list(clip.frames))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 2.0), (1.75, 2.5), (0.5, None), (2.0, None)])
def test_excerpts_are_the_frames_of_the_clip_between_two_times(name, start, end, tmp_path):
    how = {"a.mp4": {}, "a.mkv": {"container": "matroska"}, "a.avi": {"codec": "mpeg4", "container": "avi"}}[name]
    path = encode(tmp_path / name, noise(30, 32, 48), options={"g": "8"}, **how)  # 12 a second, B-frames
    whole = shown(path)
    last = len(whole) if end is None else round(end * 12)
    assert np.array_equal(excerpt(path, start, end), whole[round(start * 12) : last])


def test_an_excerpt_beyond_the_end_is_rejected(tmp_path):
    path = encode(tmp_path / "a.mp4", noise(30, 32, 48))
    for start, end, reason in ((2.0, 3.0, "truncated"), (5.0, None, "no frames"), (5.0, 6.0, "no frames")):
        with pytest.raises(RejectedClip) as error_info:
            excerpt(path, start, end)
        assert error_info.value.reason == reason


def test_excerpts_of_a_clip_longer_than_the_limit_are_allowed(tmp_path):
    path = encode(tmp_path / "a.mp4", noise(30, 32, 48))
    assert len(excerpt(path, 1.0, 1.5, max_frames=6)) == 6
    with pytest.raises(RejectedClip, match="max_frames"):
        excerpt(path, 1.0, 2.0, max_frames=6)


@pytest.mark.parametrize(
    ("fps", "kept"), [(6.0, range(0, 30, 2)), (4.0, range(0, 30, 3)), (8.0, None), (24.0, range(30))]
)
def test_a_lower_rate_skips_frames_evenly_and_a_higher_one_adds_none(fps, kept, tmp_path):
    path = encode(tmp_path / "a.mp4", noise(30, 32, 48))
    clip = read_clip(path, IngestConfig(max_fps=fps))
    assert clip.fps == min(fps, 12.0)
    numbers = (
        list(kept) if kept is not None else [0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21, 23, 24, 26, 27, 29]
    )
    assert np.array_equal(clip.frames_FHWC, shown(path)[numbers])


def test_clips_are_scaled_down_in_their_aspect_ratio_only_to_a_size_that_is_set(tmp_path):
    path = encode(tmp_path / "a.mp4", gradient(3, 64, 96), options=FINE)
    assert shown(path).shape == shown(path, fit_height=64, fit_width=96).shape == (3, 64, 96, 3)
    assert shown(path, fit_height=32).shape == shown(path, fit_width=48).shape == (3, 32, 48, 3)
    small = shown(path, fit_height=40, fit_width=48)
    means = shown(path).reshape(3, 32, 2, 48, 2, 3).mean((2, 4))
    assert np.abs(small - means).mean() < 1.5
    turned = with_display_matrix(path, 0, 1, -1, 0)
    assert shown(turned, fit_height=48).shape == (3, 48, 32, 3)
    Image.fromarray(gradient(1, 64, 96)[0]).save(tmp_path / "a.png")
    assert shown(tmp_path / "a.png", fit_width=24).shape == (1, 16, 24, 3)


def test_a_clip_within_another_file_is_read_from_its_own_bytes(tmp_path):
    path = encode(tmp_path / "a.mp4", noise(30, 32, 48))
    data = path.read_bytes()
    (tmp_path / "many.tar").write_bytes(b"x" * 1000 + data + b"y" * 1000)
    media = Media(tmp_path / "many.tar", "folder/b.MP4", 1000, len(data))
    with open_clip(media, LIMITS) as clip:
        assert np.array_equal(np.stack(list(clip.frames)), shown(path))
    assert sha256(media) == sha256(Media(path)) == hashlib.sha256(data).hexdigest()
    with (
        pytest.raises(RejectedClip, match="many.tar: folder/b.MP4"),
        open_clip(Media(tmp_path / "many.tar", "folder/b.MP4", 1000, len(data) - 700), LIMITS) as clip,
    ):
        list(clip.frames)


# ---------------------------------------------------------------- damage


def frames_region(path: Path) -> tuple[bytes, int, int]:
    """(bytes of the file, start and end of its frames, without the text that the encoder writes in front)."""
    data = path.read_bytes()
    start = data.index(b"mdat") + 4
    return data, start + 700, start + int.from_bytes(data[start - 8 : start - 4], "big") - 8


def test_a_flipped_bit_loses_no_frame_and_is_detected_if_the_stream_becomes_invalid(tmp_path):
    """A flip that leaves a valid stream of other pixels cannot be detected."""
    path = encode(tmp_path / "a.mp4", noise(12, 48, 64), options={"crf": "30"})
    (data, start, end), reasons = frames_region(path), []
    for place in np.random.default_rng(0).integers(start, end, 40):
        flipped = bytearray(data)
        flipped[place] ^= 0x10
        path.write_bytes(flipped)
        try:
            assert len(shown(path)) == 12
        except RejectedClip as error:
            reasons.append(error.reason)
    assert len(reasons) >= 5 and set(reasons) <= {"damaged", "unreadable", "truncated"}


def test_a_hole_in_the_frames_is_rejected(tmp_path):
    path = encode(tmp_path / "a.mp4", noise(12, 48, 64), options={"crf": "30"})
    data, start, end = frames_region(path)
    for place in np.random.default_rng(0).integers(start, end - 1024, 10):
        path.write_bytes(data[:place] + bytes(1024) + data[place + 1024 :])
        with pytest.raises(RejectedClip) as error_info:
            shown(path)
        assert error_info.value.reason in ("damaged", "unreadable", "truncated")


def test_a_header_of_16k_by_16k_is_rejected_before_decoding(tmp_path):
    Image.fromarray(noise(1, 16, 16)[0]).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">2I", 16384, 16384)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    path = encode(tmp_path / "a.mkv", np.zeros((1, 16384, 16, 3), np.uint8), container="matroska")
    for file, words in ((tmp_path / "a.png", "16384x16384 pixels"), (path, "16384x16 pixels; ingest.max_height=4320")):
        with pytest.raises(RejectedClip, match=words) as error_info:
            read_clip(file, LIMITS)
        assert error_info.value.reason == "too large"


def test_a_matroska_file_without_a_frame_is_rejected(tmp_path):
    encode(tmp_path / "a.mkv", noise(3, 48, 64), container="matroska")
    data = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(data[: data.index(b"\x1f\x43\xb6\x75")])  # up to the first cluster
    with pytest.raises(RejectedClip, match="a.mkv") as error_info:
        shown(tmp_path / "a.mkv")
    assert error_info.value.reason in ("no frames", "unreadable")
