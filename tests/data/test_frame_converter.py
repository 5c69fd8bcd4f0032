"""Pixels are those that a player shows: colours, depth, transparency, shape of pixels, HDR."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest

from megasora.config import IngestConfig
from megasora.data.clip_reader import read_clip
from megasora.data.media import RejectedClip
from megasora.data.media_formats import ALPHA_BACKGROUND
from megasora.data.tone_map import HLG, PQ, ToneMap
from megasora.testing.video_files import Encoding, encode_video

LIMITS = IngestConfig()
WEIGHTS = {
    "BT.601": (0.299, 0.114),
    "BT.709": (0.2126, 0.0722),
    "BT.2020": (0.2627, 0.0593),
    "SMPTE 240M": (0.212, 0.087),
}
MATRICES = {1: "BT.709", 5: "BT.601", 6: "BT.601", 7: "SMPTE 240M", 9: "BT.2020"}  # ITU-T H.273
LIMITED, FULL = 1, 2
COLORS = np.array([[16, 192, 64], [227, 49, 49], [20, 40, 220], [128, 128, 128], [250, 250, 250], [3, 3, 3]])


def yuv_planes(height: int, width: int, matrix: str, full: bool, bits: int) -> np.ndarray:
    """Planar Y, U, V as uint16 [3, H, W]: vertical bars of `COLORS`."""
    rgb = COLORS[np.arange(width) * len(COLORS) // width].astype(float) / 255
    kr, kb = WEIGHTS[matrix]
    luma = rgb @ np.array([kr, 1 - kr - kb, kb])
    chroma = [(rgb[:, 2] - luma) / (2 - 2 * kb), (rgb[:, 0] - luma) / (2 - 2 * kr)]
    unit = 1 << (bits - 8)
    if full:
        top = (1 << bits) - 1
        rows = [luma * top, *(c * top + 128 * unit for c in chroma)]
    else:
        rows = [luma * 219 * unit + 16 * unit, *(c * 224 * unit + 128 * unit for c in chroma)]
    rows = np.clip(np.rint(np.array(rows)), 0, (1 << bits) - 1).astype(np.uint16)
    return np.repeat(rows[:, None], height, 1)


def bars_of(frames_FHWC: np.ndarray) -> np.ndarray:
    """The colour in the middle of each bar of the first frame."""
    _, height, width, _ = frames_FHWC.shape
    return frames_FHWC[0, height // 2, (np.arange(len(COLORS)) * 2 + 1) * width // (2 * len(COLORS))].astype(int)


def lossless(bits: int, **settings) -> Encoding:
    pixels = "yuv444p" if bits == 8 else f"yuv444p{bits}le"
    return Encoding(codec="ffv1", container="matroska", pixels=pixels, source_pixels=pixels, **settings)


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
def test_declared_matrix_range_and_depth_are_those_of_the_conversion(matrix, full, bits, tmp_path):
    planes = yuv_planes(32, 96, MATRICES[matrix], full, bits)
    how = lossless(bits, colors=(matrix, FULL if full else LIMITED, 1, 1))
    path = encode_video(tmp_path / "a.mkv", [planes.astype(np.uint8 if bits == 8 else np.uint16)] * 2, 12, how)
    assert np.abs(bars_of(read_clip(path, LIMITS).frames_FHWC) - COLORS).max() <= 3


@pytest.mark.parametrize(
    ("size", "matrix"),
    [((719, 96), "BT.601"), ((32, 1279), "BT.601"), ((720, 96), "BT.709"), ((32, 1280), "BT.709")],
)
def test_a_video_that_declares_no_matrix_has_that_of_its_size(size, matrix, tmp_path):
    planes = yuv_planes(*size, matrix, False, 8).astype(np.uint8)
    path = encode_video(tmp_path / "a.mkv", [planes] * 2, 12, lossless(8))
    assert np.abs(bars_of(read_clip(path, LIMITS).frames_FHWC) - COLORS).max() <= 3


def test_a_matrix_that_is_not_supported_is_rejected_with_a_reason(tmp_path):
    planes = yuv_planes(32, 96, "BT.601", False, 8).astype(np.uint8)
    path = encode_video(tmp_path / "a.mkv", [planes] * 2, 12, lossless(8, colors=(14, LIMITED, 1, 1)))
    with pytest.raises(RejectedClip, match="matrix 14 of ITU-T H.273") as error_info:
        read_clip(path, LIMITS)
    assert error_info.value.reason == "colour matrix"


# ---------------------------------------------------------------- shape of pixels


def scene(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 220 // width, y * 220 // height, np.full_like(x, 60)], -1).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a.mp4", "libx264", "mp4"),
        ("a.mov", "libx264", "mov"),
        ("a.mkv", "libx264", "matroska"),
        ("a.avi", "mpeg4", "avi"),
    ],
)
@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2), Fraction(16, 11), Fraction(1)])
def test_pixels_that_are_not_square_become_square_at_the_same_height(name, codec, container, aspect, tmp_path):
    options = {"crf": "4"} if codec == "libx264" else {"qmax": "2"}
    how = Encoding(codec=codec, container=container, options=options, pixel_aspect=aspect)
    path = encode_video(tmp_path / name, [scene(64, 64)] * 3, 8, how)
    frames = read_clip(path, LIMITS).frames_FHWC
    assert frames.shape == (3, 64, round(64 * aspect), 3)
    assert np.abs(frames - scene(64, round(64 * aspect)).astype(float)).mean() < 3


def test_the_limits_of_size_hold_for_what_is_shown(tmp_path):
    how = Encoding(options={"crf": "4"}, pixel_aspect=Fraction(2))
    path = encode_video(tmp_path / "a.mp4", [scene(64, 64)] * 3, 8, how)
    assert read_clip(path, IngestConfig(max_width=128)).frames_FHWC.shape[2] == 128
    with pytest.raises(RejectedClip, match="64x128 pixels; .*ingest.max_width=127"):
        read_clip(path, IngestConfig(max_width=127))
    small = read_clip(path, IngestConfig(fit_width=32)).frames_FHWC
    assert small.shape == (3, 16, 32, 3) and np.abs(small - scene(16, 32).astype(float)).mean() < 4


def test_a_turned_video_has_square_pixels_in_its_own_direction(tmp_path):
    how = Encoding(options={"crf": "4"}, pixel_aspect=Fraction(2))
    plain = read_clip(encode_video(tmp_path / "a.mp4", [scene(64, 64)] * 3, 8, how), LIMITS).frames_FHWC
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    start, one = data.index(b"tkhd") + 44, 1 << 16
    data[start : start + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)  # a quarter clockwise
    (tmp_path / "b.mp4").write_bytes(data)
    turned = read_clip(tmp_path / "b.mp4", LIMITS).frames_FHWC
    assert np.array_equal(turned, np.rot90(plain, -1, (1, 2))) and turned.shape == (3, 128, 64, 3)


# ---------------------------------------------------------------- transparency


def see_through(alpha: int, pixels: str) -> tuple[np.ndarray, np.ndarray]:
    """A picture [32, 48, 4] of a red square on hidden green, and what is shown of it."""
    rgba = np.zeros((32, 48, 4), np.uint8)
    rgba[..., 1] = 255
    rgba[8:24, 16:32] = [220, 30, 30, alpha]
    weight = rgba[..., 3:] / 255
    shown = rgba[..., :3] * weight + np.array(ALPHA_BACKGROUND) * (1 - weight)
    return rgba[..., {"rgba": [0, 1, 2, 3], "argb": [3, 0, 1, 2], "bgra": [2, 1, 0, 3]}[pixels]], shown


@pytest.mark.parametrize("alpha", [255, 128])
@pytest.mark.parametrize(
    ("name", "settings", "source"),
    [
        ("a.mov", {"codec": "qtrle", "pixels": "argb", "container": "mov"}, "argb"),
        ("a.mov", {"codec": "png", "pixels": "rgba", "container": "mov"}, "rgba"),
        (
            "a.mov",
            {"codec": "prores_ks", "pixels": "yuva444p10le", "container": "mov", "options": {"profile": "4"}},
            "rgba",
        ),
        ("a.mkv", {"codec": "ffv1", "pixels": "bgra", "container": "matroska"}, "bgra"),
        (
            "a.webm",
            {"codec": "libvpx-vp9", "pixels": "yuva420p", "container": "webm", "options": {"lossless": "1"}},
            "rgba",
        ),
        (
            "a.webm",
            {
                "codec": "libvpx",
                "pixels": "yuva420p",
                "container": "webm",
                "options": {"crf": "4", "b": "4M", "auto-alt-ref": "0"},
            },
            "rgba",
        ),
    ],
    ids=["qtrle", "png", "prores", "ffv1", "vp9", "vp8"],
)
def test_transparent_videos_are_shown_on_the_background_and_hidden_colours_never(
    name, settings, source, alpha, tmp_path
):
    rgba, shown = see_through(alpha, source)
    path = encode_video(tmp_path / name, [rgba] * 4, 8, Encoding(source_pixels=source, **settings))
    frames = read_clip(path, LIMITS).frames_FHWC
    assert frames.shape == (4, 32, 48, 3)
    inside = np.s_[:, 10:22, 18:30]
    assert np.abs(frames[inside] - shown[None][inside]).max() <= 8
    assert np.abs(frames[:, :, :12] - shown[None, :, :12]).max() <= 2
    small = read_clip(path, IngestConfig(fit_width=12)).frames_FHWC.astype(int)
    assert (small[..., 1] <= np.maximum(small[..., 0], small[..., 2]) + 12).all()  # nowhere green


def test_the_fourth_byte_of_rgb32_in_avi_is_no_transparency(tmp_path):
    """Windows programs leave it 0, and players ignore it."""
    bars = np.broadcast_to(COLORS[np.arange(48) * len(COLORS) // 48], (16, 48, 3)).astype(np.uint8)
    rgb0 = np.concatenate([bars, np.zeros((16, 48, 1), np.uint8)], -1)
    how = Encoding(codec="rawvideo", container="avi", pixels="bgra", source_pixels="rgba")
    frames = read_clip(encode_video(tmp_path / "a.avi", [rgb0] * 3, 12, how), LIMITS).frames_FHWC
    assert np.array_equal(frames, np.stack([bars] * 3))


# ---------------------------------------------------------------- HDR


TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])  # ITU-R BT.2087


def to_light(srgb: np.ndarray) -> np.ndarray:
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def pq_signal(nits: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100, the inverse EOTF."""
    y = (nits / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg_signal(nits: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100, the inverse of a display of 1,000 cd/m2."""
    luma = nits @ np.array([0.2627, 0.6780, 0.0593]) / 1000
    scene_light = nits / 1000 * np.maximum(luma, 1e-9)[..., None] ** (1 / 1.2 - 1)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    logarithm = a * np.log(np.maximum(12 * scene_light - b, 1e-9)) + c
    return np.where(scene_light <= 1 / 12, np.sqrt(3 * scene_light), logarithm)


def sdr_scene() -> np.ndarray:
    """An sRGB picture [32, 96, 3] from 0 to 1: a grey ramp above, a red below."""
    picture = np.tile(np.linspace(0, 1, 96)[:, None], (32, 1, 3))
    picture[16:] = [0.9, 0.2, 0.2]
    return picture


def as_hdr(nits_709: np.ndarray, transfer: int) -> np.ndarray:
    """10-bit BT.2020 planes, uint16 [3, H, W], of light in cd/m2 with the primaries of BT.709."""
    light = nits_709 @ TO_BT2020.T
    rgb = (pq_signal if transfer == PQ else hlg_signal)(light)
    kr, kb = WEIGHTS["BT.2020"]
    luma = rgb @ np.array([kr, 1 - kr - kb, kb])
    chroma = [(rgb[..., 2] - luma) / (2 - 2 * kb), (rgb[..., 0] - luma) / (2 - 2 * kr)]
    return np.rint([luma * 876 + 64, *(c * 896 + 512 for c in chroma)]).astype(np.uint16)


@pytest.mark.parametrize("transfer", [PQ, HLG], ids=["PQ", "HLG"])
def test_an_sdr_scene_that_is_stored_as_hdr_comes_out_as_the_sdr_scene(transfer, tmp_path):
    """Up to 0.8 of reference white, 230 of 255; brighter pixels make room for highlights."""
    planes = as_hdr(203 * to_light(sdr_scene()), transfer)
    how = lossless(10, colors=(9, LIMITED, transfer, 9))
    frames = read_clip(encode_video(tmp_path / "a.mkv", [planes] * 2, 8, how), LIMITS).frames_FHWC
    expected = np.rint(255 * sdr_scene())
    dark = expected.max(-1) <= 228
    assert np.abs(frames[0] - expected)[dark].max() <= 3
    assert np.abs(frames[0, :16] - expected[:16]).max() <= 13  # 5 %
    assert np.abs(frames[0, 24, 48] - [229.5, 51, 51]).max() <= 4


@pytest.mark.parametrize("transfer", [PQ, HLG], ids=["PQ", "HLG"])
def test_highlights_stay_in_order_up_to_1000_nits(transfer, tmp_path):
    nits = np.tile(np.linspace(0, 1000, 96)[:, None], (32, 1, 3))
    how = lossless(10, colors=(9, LIMITED, transfer, 9))
    frames = read_clip(encode_video(tmp_path / "a.mkv", [as_hdr(nits, transfer)] * 2, 8, how), LIMITS).frames_FHWC
    ramp = frames[0, 4, :, 1].astype(int)
    assert (np.diff(ramp) >= -1).all() and ramp[0] == 0 and ramp[-1] >= 254
    assert 240 <= ramp[np.searchsorted(nits[0, :, 0], 203)] <= 246  # reference white
    assert len(set(ramp[20:])) >= 10


def test_the_hue_of_a_highlight_stays():
    light = np.array([4.0, 1.0, 0.5])
    levels = np.rint(pq_signal(203 * light @ TO_BT2020.T) * 65535).astype(np.uint16)
    shown = to_light(ToneMap(PQ, 9).convert(levels[None, None])[0, 0] / 255)
    assert shown / shown[0] == pytest.approx(light / light[0], abs=0.01)


def test_sdr_with_the_primaries_of_bt2020_becomes_bt709():
    """Greys stay, and a colour of BT.709 that was stored with wider primaries comes back."""
    color = np.array([0.8, 0.3, 0.4])
    stored = (color**2.4 @ TO_BT2020.T) ** (1 / 2.4)
    levels = np.rint(np.array([[stored, [0.5, 0.5, 0.5], [1.0, 1.0, 1.0]]]) * 65535).astype(np.uint16)
    shown = ToneMap(1, 9).convert(levels)[0]
    assert np.abs(shown - [255 * color, [127.5] * 3, [255] * 3]).max() <= 1


def test_hdr_with_transparency_is_rejected_with_a_reason(tmp_path):
    how = Encoding(
        codec="prores_ks",
        container="mov",
        pixels="yuva444p10le",
        source_pixels="rgba",
        options={"profile": "4"},
        colors=(9, LIMITED, PQ, 9),
    )
    path = encode_video(tmp_path / "a.mov", [np.full((32, 48, 4), 100, np.uint8)] * 2, 8, how)
    with pytest.raises(RejectedClip) as error_info:
        read_clip(path, LIMITS)
    assert error_info.value.reason == "alpha"
