"""All frames of a file are read, whatever lies beside them, and no more than players show."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from megasora.config import IngestConfig
from megasora.data.clip_reader import open_clip, read_clip
from megasora.data.media import Media, RejectedClip
from megasora.data.video import open_source
from megasora.testing.video_files import AUDIO_RATE, Encoding, copy_packets, encode_video, gradient, silence

LIMITS = IngestConfig()
CODEC_ERROR = 3.0  # grey levels, mean over a frame; two neighbouring frames of `gradient` are 6.7 apart
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
H264, MPEG2 = {"codec": "libx264", "options": {"crf": "5"}}, {"codec": "mpeg2video", "options": {"qmax": "2"}}
CONTAINERS = {  # file -> (how it is encoded, its codec of sound)
    "a.mp4": ({**H264}, "aac"),
    "fragments.mp4": ({**H264, "muxer_options": FRAGMENTS}, "aac"),
    "a.m4v": ({**H264}, "aac"),
    "a.mov": ({**H264, "container": "mov"}, "pcm_s16le"),
    "a.mkv": ({**H264, "container": "matroska"}, "libopus"),
    "vp8.webm": ({"codec": "libvpx", "container": "webm", "options": {"crf": "5", "b": "2M"}}, "libopus"),
    "vp9.webm": ({"codec": "libvpx-vp9", "container": "webm", "options": {"crf": "5"}}, "libopus"),
    "h264.avi": ({**H264, "container": "avi"}, "pcm_s16le"),
    "mpeg4.avi": ({"codec": "mpeg4", "container": "avi", "options": {"qmax": "2"}}, "pcm_s16le"),
    "a.ts": ({**H264, "container": "mpegts"}, "aac"),
    "a.mpg": ({**MPEG2, "container": "mpeg"}, "mp2"),
    "a.flv": ({**H264, "container": "flv"}, "aac"),
}
WITH_TIMECODE = ("a.mp4", "a.m4v", "a.mov")


def assert_shown(clip, made: np.ndarray, fps: float = 12.0) -> None:
    frames = clip.frames_FHWC
    assert frames.shape == made.shape
    assert np.abs(frames.astype(float) - made).mean((1, 2, 3)).max() < CODEC_ERROR
    assert clip.fps == fps


ORDERS = ["alone", "sound first", "sound last", "timecode", "sound first and timecode"]
STREAMS = [
    (name, order, b_frames)
    for name in CONTAINERS
    for order in (ORDERS if name in WITH_TIMECODE else ORDERS[:3])
    for b_frames in ("0", "2")
    if b_frames == "0" or not name.endswith("webm")
]


@pytest.mark.parametrize(("name", "order", "b_frames"), STREAMS)
def test_every_frame_is_read_in_every_order_of_streams(name, order, b_frames, tmp_path):
    settings, audio_codec = CONTAINERS[name]
    options = settings["options"] if name.endswith("webm") else {**settings["options"], "bf": b_frames}
    how = Encoding(
        **{**settings, "options": options},
        audio_codec=audio_codec if "sound" in order else "",
        audio_first="first" in order,
        metadata={"timecode": "01:00:00:00"} if "timecode" in order else {},
    )
    made = gradient(11, 32, 48)
    path = encode_video(tmp_path / name, made, 12, how)
    with av.open(str(path)) as file:
        kinds = [stream.type for stream in file.streams]
    expected = {"alone": ["video"], "sound first": ["audio", "video"], "sound last": ["video", "audio"]}
    assert kinds == expected.get(order.removesuffix(" and timecode"), ["video"]) + ["data"] * ("timecode" in order)
    assert_shown(read_clip(path, LIMITS), made)


@pytest.mark.parametrize("name", CONTAINERS)
def test_excerpts_of_every_container_are_frames_of_the_whole(name, tmp_path):
    settings, audio_codec = CONTAINERS[name]
    options = {**settings["options"], "g": "4", **({} if name.endswith("webm") else {"bf": "2"})}
    how = Encoding(**{**settings, "options": options}, audio_codec=audio_codec, audio_first=True)
    path = encode_video(tmp_path / name, gradient(24, 32, 48), 12, how)
    whole = read_clip(path, LIMITS).frames_FHWC
    for first, stop in ((0, 3), (1, 9), (7, 12), (12, 24), (22, 24)):
        with open_clip(Media(path, start=first / 12, end=stop / 12), LIMITS) as clip:
            assert np.array_equal(np.stack(list(clip.frames)), whole[first:stop])
            assert clip.fps == 12.0


def test_a_cover_picture_is_no_video(tmp_path):
    """As music players store it, beside sound."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        cover, sound = file.add_stream("mjpeg", rate=12), file.add_stream("aac", rate=AUDIO_RATE)
        cover.height, cover.width, cover.pix_fmt = 16, 16, "yuvj420p"
        cover.disposition, sound.layout = av.stream.Disposition.attached_pic, "mono"
        picture = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 99, np.uint8), format="rgb24")
        picture.pts = 0
        file.mux([*cover.encode(picture), *cover.encode(None)])
        for frame in silence(sound, 0.5):
            file.mux(sound.encode(frame))
        file.mux(sound.encode(None))
    with av.open(str(path)) as file:
        assert [stream.codec_context.name for stream in file.streams.video] == ["mjpeg"]
    with pytest.raises(RejectedClip) as error_info:
        read_clip(path, LIMITS)
    assert error_info.value.reason == "no video stream"


def test_hidden_reference_frames_of_vp8_are_no_frames(tmp_path):
    made = gradient(11, 32, 48)
    how = Encoding(codec="libvpx", container="webm", options={"b": "2M", "crf": "4"})
    encode_video(tmp_path / "a.webm", made, 12, how)
    with av.open(str(tmp_path / "a.webm")) as source, av.open(str(tmp_path / "b.webm"), "w", format="webm") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.size:
                data = bytearray(bytes(packet))
                data[0] &= ~0x10  # show_frame
                hidden = av.Packet(bytes(data))
                hidden.pts = hidden.dts = packet.pts - 20
                hidden.time_base, hidden.is_keyframe = packet.time_base, packet.is_keyframe
                for written in [hidden, packet] if packet.pts else [packet]:
                    written.stream = copy
                    target.mux(written)
    with av.open(str(tmp_path / "b.webm")) as file:
        assert sum(1 for packet in file.demux() if packet.size) == 21
    clip = read_clip(tmp_path / "b.webm", LIMITS)
    assert len(clip.frames_FHWC) == 11 and clip.fps == 12.0


# ---------------------------------------------------------------- cuts


OPEN_GOP = {
    "libx264": {"crf": "5", "bf": "2", "g": "6", "x264-params": "open-gop=1:keyint=6:min-keyint=6:scenecut=0"},
    "libx265": {"crf": "5", "x265-params": "log-level=error:open-gop=1:keyint=6:min-keyint=6:scenecut=0:bframes=2"},
}


def cut(tmp_path: Path, codec: str, name: str, start: Fraction, made: np.ndarray) -> Path:
    whole = encode_video(tmp_path / "whole.mp4", made, 12, Encoding(codec=codec, options=OPEN_GOP[codec]))
    container = "matroska" if name.endswith("mkv") else "mp4"
    options = {"use_editlist": "0", "avoid_negative_ts": "make_zero"} if name == "plain.mp4" else {}
    return copy_packets(whole, tmp_path / name, container, options, start)


@pytest.mark.parametrize("codec", OPEN_GOP)
@pytest.mark.parametrize("name", ["plain.mp4", "edit-list.mp4", "a.mkv"])
def test_a_cut_at_an_open_gop_has_the_frames_from_its_key_frame_on(codec, name, tmp_path):
    """The frames that are stored after the key frame and displayed before it refer to frames that are gone."""
    made = gradient(20, 64, 96)
    path = cut(tmp_path, codec, name, Fraction(6, 12), made)
    with av.open(str(path)) as file:
        stored = sum(1 for packet in file.demux() if packet.size)
    assert stored > 14
    clip = read_clip(path, LIMITS)
    assert np.array_equal(clip.frames_FHWC, read_clip(tmp_path / "whole.mp4", LIMITS).frames_FHWC[6:])
    assert clip.fps == 12.0


@pytest.mark.parametrize("codec", OPEN_GOP)
def test_frames_outside_an_edit_list_are_not_returned(codec, tmp_path):
    path = cut(tmp_path, codec, "edit-list.mp4", Fraction(9, 12), gradient(20, 64, 96))
    clip = read_clip(path, LIMITS)
    assert np.array_equal(clip.frames_FHWC, read_clip(tmp_path / "whole.mp4", LIMITS).frames_FHWC[9:])


@pytest.mark.parametrize("codec", OPEN_GOP)
@pytest.mark.parametrize("name", ["plain.mp4", "a.mkv"])
def test_excerpts_that_start_before_the_key_frame_of_an_open_gop_are_whole(codec, name, tmp_path):
    path = cut(tmp_path, codec, name, Fraction(0), gradient(20, 64, 96))
    whole = read_clip(path, LIMITS)
    assert len(whole.frames_FHWC) == 20
    for first in range(1, 18):
        with open_clip(Media(path, start=first / 12, end=(first + 2) / 12), LIMITS) as clip:
            assert np.array_equal(np.stack(list(clip.frames)), whole.frames_FHWC[first : first + 2])


def test_a_recording_with_a_gap_is_truncated_and_says_where(tmp_path):
    """Two transport streams in one file: the counters of their packets do not continue."""
    path = encode_video(tmp_path / "a.ts", gradient(11, 32, 48), 12, Encoding(container="mpegts"))
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(RejectedClip, match="has a frame that is not complete, after") as error_info:
        read_clip(path, LIMITS)
    assert error_info.value.reason == "truncated"


def test_frames_whose_time_stamps_go_backwards_are_a_variable_rate(tmp_path):
    path = encode_video(tmp_path / "a.mp4", gradient(5, 32, 48), 12, Encoding())
    with av.open(str(path)) as container:
        source = open_source(container, Media(path), LIMITS)
        ticks = source.times.ticks_N.tolist()
        assert source.number_of(SimpleNamespace(pts=ticks[2]), 2) == 2
        for pts, following in ((ticks[1], 2), (ticks[2] + 1, 2), (ticks[4], 5)):
            with pytest.raises(RejectedClip) as error_info:
                source.number_of(SimpleNamespace(pts=pts), following)
            assert error_info.value.reason == "variable rate"


def test_empty_packets_repeat_a_frame_and_lose_none(tmp_path):
    """As encoders of Theora write a frame that equals the one before it."""
    made = gradient(5, 32, 48)
    path = encode_video(tmp_path / "a.mp4", made, 12, Encoding(options={"bf": "0"}))
    with av.open(str(path)) as container:
        source = open_source(container, Media(path), LIMITS)

        def demux(stream):
            for packet in container.demux(stream):
                if packet.dts is not None:
                    empty = av.Packet(b"")
                    empty.pts, empty.dts, empty.time_base = packet.pts, packet.dts, packet.time_base
                    yield empty
                yield packet

        with_empty = replace(source, container=SimpleNamespace(demux=demux, seek=container.seek))
        assert [number for number, _ in with_empty.decode()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("codec", "options"), [("mpeg4", {"qmax": "2"}), ("libx264", {"crf": "5"})])
def test_a_copy_of_an_avi_file_has_its_frames_in_the_order_of_display(codec, options, tmp_path):
    """avi stores no times of display; FFmpeg copies it to mp4 with decoding times in their place."""
    made = gradient(11, 32, 48)
    how = Encoding(codec=codec, container="avi", options={**options, "bf": "2"})
    path, copy = encode_video(tmp_path / "a.avi", made, 12, how), tmp_path / "a.mp4"
    with av.open(str(path)) as file, av.open(str(copy), "w") as target:
        stream = file.streams.video[0]
        out = target.add_stream_from_template(stream)
        for packet in file.demux(stream):
            if packet.size:
                packet.pts, packet.stream = packet.dts, out
                target.mux(packet)
    assert_shown(read_clip(copy, LIMITS), made)
    with open_clip(Media(copy, start=4 / 12, end=7 / 12), LIMITS) as clip:
        assert len(list(clip.frames)) == 3


# ---------------------------------------------------------------- damage


def flips(path: Path, count: int, seed: int = 0):
    """Yields the bytes of a file with one byte in the slices of a frame changed."""
    data, rng = path.read_bytes(), np.random.default_rng(seed)
    with av.open(str(path)) as file:
        spans = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]
    sizes = np.array([size for _, size in spans])
    for _ in range(count):
        frame = rng.choice(len(spans), p=sizes / sizes.sum())
        headers = 750 if frame == 0 else 8  # the first packet starts with the text of the encoder
        changed = bytearray(data)
        changed[spans[frame][0] + rng.integers(headers, spans[frame][1])] ^= int(rng.integers(1, 256))
        yield changed


def noisy_waves(frames: int) -> np.ndarray:
    """Moving uint8 frames of 96x128 pixels with some noise."""
    y, x = np.mgrid[:96, :128]
    waves = [
        127 + 100 * np.stack([np.sin((x + 4 * t) / 9), np.sin((y - 3 * t) / 7), np.cos((x + y) / 13)], -1)
        for t in range(frames)
    ]
    return np.clip(waves + np.random.default_rng(0).normal(0, 8, (frames, 96, 128, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("entropy_coding", "least"), [("cabac", 0.6), ("vlc", 0.8)])
def test_most_changed_bytes_of_h264_are_noticed(entropy_coding, least, tmp_path):
    """A changed byte that leaves a valid stream of other pixels cannot be noticed; see the counts in docs/data.md."""
    made, how = noisy_waves(12), Encoding(options={"coder": entropy_coding})
    path, noticed = encode_video(tmp_path / "a.mp4", made, 12, how), 0
    assert len(read_clip(path, LIMITS).frames_FHWC) == 12
    for changed in flips(path, 100):
        (tmp_path / "b.mp4").write_bytes(changed)
        try:
            assert len(read_clip(tmp_path / "b.mp4", LIMITS).frames_FHWC) == 12
        except RejectedClip as error:
            assert error.reason in ("damaged", "unreadable", "truncated")
            assert "object at" not in str(error)
            noticed += 1
    assert noticed >= 100 * least


@pytest.mark.parametrize(
    "options",
    [
        {"coder": "vlc", "x264-params": "slices=4"},
        {"profile": "baseline"},
        {"x264-params": "nal-hrd=cbr:vbv-maxrate=200:vbv-bufsize=200:bitrate=200"},  # with filler
        {"x264-params": "intra-refresh=1:keyint=8"},
        {"x264-params": "tff=1"},
    ],
    ids=str,
)
def test_kinds_of_h264_that_are_whole_are_not_taken_for_damaged(options, tmp_path):
    made = gradient(11, 48, 64)
    for name, container in (("a.mp4", "mp4"), ("a.mkv", "matroska")):
        path = encode_video(tmp_path / name, made, 12, Encoding(container=container, options={"crf": "8", **options}))
        assert len(read_clip(path, LIMITS).frames_FHWC) == 11


@pytest.mark.parametrize("codec", ["mjpeg", "wmv1", "wmv2", "msmpeg4", "flv"])
def test_holes_in_frames_are_noticed_where_decoders_conceal_them(codec, tmp_path):
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    how = Encoding(codec=codec, container="avi", pixels=pixels, options={"qmax": "4"})
    path, rng, noticed = encode_video(tmp_path / "a.avi", noisy_waves(4), 12, how), np.random.default_rng(0), 0
    assert len(read_clip(path, LIMITS).frames_FHWC) == 4
    data = path.read_bytes()
    with av.open(str(path)) as file:
        assert file.streams.video[0].codec_context.name == codec
        spans = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]
    for _ in range(20):
        start, size = spans[rng.integers(len(spans))]
        hole = start + 700 + int(rng.integers(max(1, size - 956)))
        (tmp_path / "b.avi").write_bytes(data[:hole] + bytes(256) + data[hole + 256 :])
        try:
            read_clip(tmp_path / "b.avi", LIMITS)
        except RejectedClip as error:
            assert error.reason in ("damaged", "unreadable", "truncated")
            noticed += 1
    assert noticed >= 18
