"""Pictures are read as viewers show them, and damaged ones are rejected. Inputs are made by Pillow or by hand."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from megasora.config import IngestConfig
from megasora.data.clip_reader import read_clip
from megasora.data.media import RejectedClip
from megasora.data.media_formats import ALPHA_BACKGROUND

LIMITS = IngestConfig()
HEIGHT, WIDTH = 24, 32
RED, HIDDEN = (220, 30, 30), (0, 255, 0)
DISC = np.add(*np.mgrid[-12:12, -16:16] ** 2) < 80


def read(path: Path) -> np.ndarray:
    """uint8 [H, W, 3]"""
    clip = read_clip(path, LIMITS)
    assert len(clip.frames_FHWC) == 1 and clip.fps == 0.0
    return clip.frames_FHWC[0]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(rows: list[bytes], width: int, depth: int, color: int, *chunks: bytes, interlaced: int = 0) -> bytes:
    """A PNG file of unfiltered rows of packed samples."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, color, 0, 0, interlaced))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def photo(seed: int, height: int = 240, width: int = 320) -> np.ndarray:
    """A picture with the spectrum of photographs, and an edge."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij"))
    frequency[0, 0] = 1
    layers = [np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) / frequency**1.2).real for _ in range(3)]
    x = np.dstack([layers[0], layers[0] + 0.3 * layers[1], layers[0] + 0.3 * layers[2]])
    x = (x - x.mean()) / x.std() * 45 + 120
    x[height // 3 : height // 2, width // 4 : width // 2] += 60
    return np.clip(x, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------- transparency


def levels_with_key(depth: int, color: int) -> bytes:
    """A PNG file of `depth` bits whose transparent level, 1, or (1, 1, 1), is outside of the disc; inside is black."""
    samples = np.where(DISC, 0, 1)
    if depth < 8:
        bits = np.unpackbits(samples.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        rows = [np.packbits(row).tobytes() for row in bits.reshape(HEIGHT, -1)]
    else:
        kind = ">u2" if depth == 16 else "u1"
        rows = [row.astype(kind).repeat(3 if color == 2 else 1).tobytes() for row in samples]
    key = struct.pack(">H", 1) * (3 if color == 2 else 1)
    return png(rows, WIDTH, depth, color, chunk(b"tRNS", key))


def transparent_picture(kind: str, path: Path) -> None:
    """A red disc on pixels that are fully transparent and hold bright green."""
    rgba = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    rgba[...] = (*HIDDEN, 0)
    rgba[DISC] = (*RED, 255)
    palette = Image.fromarray(DISC.astype(np.uint8), "P")
    palette.putpalette([*HIDDEN, *RED])
    if kind in ("RGBA", "exact", "two colors"):
        Image.fromarray(rgba).save(path, **{"exact": {"lossless": True, "exact": True}}.get(kind, {}))
    elif kind == "color key":
        Image.fromarray(rgba[..., :3]).save(path, transparency=HIDDEN)
    elif kind == "index":
        palette.save(path, transparency=0)
    elif kind == "table":
        palette.save(path, transparency=bytes([0, 255]))
    elif kind == "avif":
        Image.fromarray(rgba).save(path, quality=100, subsampling="4:4:4")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.png", "RGBA"),
        ("a.tif", "RGBA"),
        ("a.webp", "exact"),
        ("a.png", "color key"),
        ("a.png", "index"),
        ("a.gif", "index"),
        ("a.png", "table"),
        ("a.avif", "avif"),
    ],
)
def test_hidden_colors_never_appear(name, kind, tmp_path):
    transparent_picture(kind, tmp_path / name)
    made = np.where(DISC[..., None], RED, ALPHA_BACKGROUND)
    tolerance = 12 if kind == "avif" else 0  # it is lossy, and rings at edges
    assert np.abs(read(tmp_path / name).astype(int) - made).max() <= tolerance


@pytest.mark.parametrize(("depth", "color"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)])
def test_a_transparent_level_is_compared_in_the_depth_of_the_file(depth, color, tmp_path):
    (tmp_path / "a.png").write_bytes(levels_with_key(depth, color))
    shown = read(tmp_path / "a.png")
    if (depth, color) == (16, 2):  # known limit: the high bytes are compared, and those of levels 0 and 1 are equal
        assert (shown == ALPHA_BACKGROUND).all()
    else:
        assert np.array_equal(shown, np.where(DISC[..., None], 0, ALPHA_BACKGROUND))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA table"])
def test_half_transparent_pixels_are_mixed_with_the_background(mode, tmp_path):
    alpha = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (HEIGHT, 1))
    if mode == "RGBA":
        color = RED
        Image.fromarray(np.dstack([np.full((HEIGHT, WIDTH, 3), RED, np.uint8), alpha])).save(tmp_path / "a.png")
    elif mode == "LA":
        color = (90, 90, 90)
        Image.fromarray(np.dstack([np.full((HEIGHT, WIDTH), 90, np.uint8), alpha])).save(tmp_path / "a.png")
    else:
        color = RED
        image = Image.fromarray(alpha // 8, "P")
        image.putpalette(RED * 32)
        image.save(tmp_path / "a.png", transparency=bytes(range(0, 256, 8)))
    weight = alpha[..., None] / 255
    made = np.array(color) * weight + np.array(ALPHA_BACKGROUND) * (1 - weight)
    assert np.abs(read(tmp_path / "a.png") - made).max() <= 0.51


# ---------------------------------------------------------------- depth and color


def test_16_bits_are_scaled_to_8(tmp_path):
    levels = np.array([[0, 128, 257, 30000, 32768, 65000, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    Image.fromarray(levels).save(tmp_path / "a.tif")
    (tmp_path / "rgb.png").write_bytes(png([levels.astype(">u2").repeat(3).tobytes()], 7, 16, 2))
    made = [0, 0, 1, 117, 128, 253, 255]
    for name in ("a.png", "a.tif", "rgb.png"):
        assert read(tmp_path / name)[0].tolist() == [[level] * 3 for level in made], name


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_few_bits_are_scaled_to_8(depth, tmp_path):
    levels = np.arange(2**depth, dtype=np.uint8)
    bits = np.unpackbits(levels[:, None], axis=1)[:, 8 - depth :]
    (tmp_path / "a.png").write_bytes(png([np.packbits(bits).tobytes()], 2**depth, depth, 0))
    assert read(tmp_path / "a.png")[0, :, 0].tolist() == [level * 255 // (2**depth - 1) for level in range(2**depth)]


def test_32_bit_pixels_are_rejected(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(RejectedClip, match="32 bits"):
        read(tmp_path / "a.tif")


def test_the_inks_of_a_cmyk_jpeg_are_not_inverted(tmp_path):
    """Pillow writes the marker of Adobe, with inverted inks."""
    made = np.full((16, 16, 3), (250, 240, 20), np.uint8)
    Image.fromarray(made).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read(tmp_path / "a.jpg").astype(int) - made).max() <= 3


ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))  # XYZ of D50
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def profile(space: bytes, gamma: float, primaries=()) -> bytes:
    """An ICC profile of version 2: a grey one, or one of three primaries in XYZ."""
    white = struct.pack(">4s4x3i", b"XYZ ", *(round(v * 65536) for v in (0.9642, 1.0, 0.8249)))
    curve = struct.pack(">4s4xIH2x", b"curv", 1, round(gamma * 256))
    tags = [(b"wtpt", white), (b"desc", b"desc" + bytes(8) + b"\0\0\0\x02x\0" + bytes(78))]
    if space == b"GRAY":
        tags += [(b"kTRC", curve)]
    for letter, xyz in zip("rgb", primaries, strict=False):
        data = struct.pack(">4s4x3i", b"XYZ ", *(round(v * 65536) for v in xyz))
        tags += [(f"{letter}XYZ".encode(), data), (f"{letter}TRC".encode(), curve)]
    table, body, offset = b"", b"", 132 + 12 * len(tags)
    for name, data in tags:
        table += struct.pack(">4sII", name, offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4xI4s4s4s", offset + len(body), 0x02100000, b"mntr", space, b"XYZ ") + bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + white[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def from_adobe_rgb(color: tuple) -> np.ndarray:
    """The formulas of the two color spaces."""
    xyz = np.array(ADOBE_RGB).T @ (np.array(color) / 255) ** 2.19921875
    linear = np.linalg.solve(np.array(SRGB).T, xyz)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.abs(linear) ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.avif"])
def test_a_wide_gamut_is_converted_to_srgb(name, tmp_path):
    color = (120, 160, 90)
    options = {"quality": 100} if name != "a.png" else {}
    icc = profile(b"RGB ", 2.19921875, ADOBE_RGB)
    Image.new("RGB", (16, 16), color).save(tmp_path / name, icc_profile=icc, **options)
    made = from_adobe_rgb(color)
    assert np.abs(made - color).max() > 20
    assert np.abs(read(tmp_path / name) - made).max() <= 3


def test_a_grey_profile_is_applied_and_transparency_is_kept(tmp_path):
    pixels = np.array([[[128, 255], [128, 0]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile(b"GRAY", 1.0))
    assert read(tmp_path / "a.png")[0].tolist() == [[188] * 3, list(ALPHA_BACKGROUND)]  # linear light to sRGB


@pytest.mark.parametrize("kind", ["srgb", "broken", "of another space", "empty"])
def test_a_profile_that_is_srgb_or_not_valid_changes_no_pixel(kind, tmp_path):
    icc = {
        "srgb": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        "broken": profile(b"RGB ", 2.2, ADOBE_RGB)[:150],
        "of another space": profile(b"GRAY", 1.0),
        "empty": bytes(3),
    }[kind]
    Image.fromarray(made := photo(0, 64, 64)).save(tmp_path / "a.png", icc_profile=icc)
    assert np.array_equal(read(tmp_path / "a.png"), made)


def test_pictures_of_hdr_are_rejected(tmp_path):
    for transfer in (16, 18):
        cicp = chunk(b"cICP", bytes([9, transfer, 0, 1]))
        (tmp_path / "a.png").write_bytes(png([bytes(6)], 2, 8, 2, cicp))
        with pytest.raises(RejectedClip) as error_info:
            read(tmp_path / "a.png")
        assert error_info.value.reason == "hdr"
    (tmp_path / "a.png").write_bytes(png([bytes(6)], 2, 8, 2, chunk(b"cICP", bytes([1, 13, 0, 1]))))
    assert read(tmp_path / "a.png").shape == (1, 2, 3)


# ---------------------------------------------------------------- orientation

SHOWN = {  # EXIF orientation -> how the stored picture is shown
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: np.rot90(x, 2),
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.avif"])
def test_every_orientation_is_shown_upright(name, tmp_path):
    y, x = np.mgrid[0:24, 0:32]
    made = np.dstack([x * 7, y * 9, np.full_like(x, 60)]).astype(np.uint8)
    options = {"a.webp": {"lossless": True}, "a.jpg": {"quality": 98}, "a.avif": {"quality": 98}}.get(name, {})
    for orientation, shown in SHOWN.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(made).save(tmp_path / name, exif=exif, **options)
        pixels = read(tmp_path / name)
        assert pixels.shape == shown(made).shape, orientation
        assert np.abs(pixels.astype(float) - shown(made)).mean() < 2, orientation


@pytest.mark.filterwarnings("ignore")  # of Pillow's EXIF parser
@pytest.mark.parametrize("kind", ["offset", "byte order", "type", "value"])
def test_exif_that_cannot_be_read_is_ignored(kind, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    Image.fromarray(photo(0, 48, 64)).save(tmp_path / "a.jpg", exif=exif)
    data = bytearray((tmp_path / "a.jpg").read_bytes())
    start = data.index(b"Exif\0\0") + 6
    entry = data.index(b"\x01\x12", start)
    at, value = {
        "offset": (start + 4, b"\xff\xff\xff\x7f"),
        "byte order": (start, b"XX\0\0"),
        "type": (entry + 2, b"\0\x05"),
        "value": (entry + 8, b"\0\x99"),
    }[kind]
    data[at : at + len(value)] = value
    (tmp_path / "a.jpg").write_bytes(data)
    assert read(tmp_path / "a.jpg").shape == (48, 64, 3)


# ---------------------------------------------------------------- good files


def test_long_text_of_a_png_is_not_read(tmp_path):
    made = photo(0, 48, 64)
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "node " * 400_000, zip=True)
    info.add_itxt("parameters", "a cat " * 400_000, zip=True)
    Image.fromarray(made).save(tmp_path / "a.png", pnginfo=info)
    assert np.array_equal(read(tmp_path / "a.png"), made)


def test_100_mb_of_text_take_no_memory(tmp_path):
    data = png([bytes(96)] * 32, 32, 8, 2)
    with open(tmp_path / "a.png", "wb") as file:
        file.write(data[:33] + struct.pack(">I4s", 100_000_000, b"tEXt"))
        file.seek(100_000_004, 1)
        file.write(data[33:])
    tracemalloc.start()
    assert read(tmp_path / "a.png").shape == (32, 32, 3)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp"])
def test_bytes_after_the_end_are_ignored(name, tmp_path):
    Image.fromarray(photo(0, 48, 64)).save(tmp_path / name)
    before = read(tmp_path / name)
    for tail in (bytes(4000), np.random.default_rng(0).bytes(4000)):
        with open(tmp_path / name, "ab") as file:
            file.write(tail)
        assert np.array_equal(read(tmp_path / name), before)


def test_a_jpeg_with_many_large_segments_and_a_camera_file_of_two_pictures_are_read(tmp_path):
    Image.fromarray(photo(0)).save(tmp_path / "a.jpg", quality=90)
    plain, pixels = (tmp_path / "a.jpg").read_bytes(), read(tmp_path / "a.jpg")
    segment = b"\xff\xed\xff\xff" + b"\xff\xd9\xff\xda" * 16383 + b"\0"  # its contents look like markers
    (tmp_path / "a.jpg").write_bytes(plain[:20] + segment * 60 + plain[20:])
    assert np.array_equal(read(tmp_path / "a.jpg"), pixels)
    first, second = (Image.fromarray(photo(seed)) for seed in (0, 1))
    first.save(tmp_path / "b.jpg", format="MPO", save_all=True, append_images=[second], quality=90)
    assert np.array_equal(read(tmp_path / "b.jpg"), pixels)


def test_no_undamaged_jpeg_or_webp_is_rejected(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [photo(seed, *(int(v) for v in rng.integers(1, 120, 2))) for seed in range(4)]
    pictures += [np.full((70, 50, 3), 9, np.uint8), rng.integers(0, 256, (61, 33, 3)).astype(np.uint8)]
    options = [{}, {"subsampling": 0}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 3}]
    for picture in pictures:
        for quality in (1, 50, 90, 100):
            for mode in ("RGB", "L", "CMYK"):
                for how in options:
                    Image.fromarray(picture).convert(mode).save(tmp_path / "a.jpg", quality=quality, **how)
                    assert read(tmp_path / "a.jpg").shape == picture.shape
            for how in ({"method": 0}, {"lossless": True, "method": 0}):
                Image.fromarray(picture).save(tmp_path / "a.webp", quality=quality, **how)
                assert read(tmp_path / "a.webp").shape == picture.shape


def test_zeros_that_cameras_write_before_the_end_of_a_jpeg_are_no_damage(tmp_path):
    Image.fromarray(photo(0)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[:-2] + bytes(500) + data[-2:])
    assert read(tmp_path / "a.jpg").shape == (240, 320, 3)


# ---------------------------------------------------------------- damaged files


def rejected(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    try:
        read(path)
    except RejectedClip as error:
        assert error.reason == "unreadable" and "0x" not in str(error)
        return True
    return False


def adam7_rows(pixels: np.ndarray) -> list[bytes]:
    """The unfiltered rows of the passes of an interlaced picture, with their filter bytes."""
    starts = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    passes = [pixels[y::dy, x::dx] for y, x, dy, dx in starts]
    return [b"\0" + row.tobytes() for part in passes if part.size for row in part]


def short_png(pixels: np.ndarray, fraction: float, interlaced: bool) -> bytes:
    """A PNG file whose stream of pixels is complete and valid, but has only a fraction of the rows."""
    rows = adam7_rows(pixels) if interlaced else [b"\0" + row.tobytes() for row in pixels]
    stream = zlib.compress(b"".join(rows[: round(fraction * len(rows))]))
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 2, 0, 0, interlaced)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", stream) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("interlaced", [False, True])
def test_a_png_whose_pixels_end_early_is_rejected(interlaced, tmp_path):
    made = photo(0, 256, 64)
    for rows in (60, 255):
        assert rejected(tmp_path / "a.png", short_png(made, rows / 256, interlaced)), rows
    assert not rejected(tmp_path / "a.png", short_png(made, 1, interlaced))
    assert np.array_equal(read(tmp_path / "a.png"), made)


@pytest.mark.parametrize("depth_color", [(1, 0), (2, 3), (4, 0), (16, 0), (16, 2), (8, 4), (16, 6)])
def test_interlaced_pngs_of_every_depth_have_the_size_that_is_expected(depth_color, tmp_path):
    depth, color = depth_color
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    for height, width in ((1, 1), (3, 2), (9, 13)):
        starts = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
        sizes = [(-(-(height - y) // dy), -(-(width - x) // dx)) for y, x, dy, dx in starts]
        rows = [bytes(1 + -(-w * depth * channels // 8)) for h, w in sizes if w > 0 for _ in range(h)]
        header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 1)
        palette = chunk(b"PLTE", bytes(12)) if color == 3 else b""
        for kept in (rows, rows[:-1]):
            stream = chunk(b"IDAT", zlib.compress(b"".join(kept)))
            data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + stream + chunk(b"IEND", b"")
            assert rejected(tmp_path / "a.png", data) == (kept is not rows)


@pytest.mark.filterwarnings("ignore")  # of Pillow's TIFF parser
@pytest.mark.parametrize("name", ["a.bmp", "a.tif", "lzw.tif", "a.avif"])
def test_cut_files_of_other_formats_are_rejected(name, tmp_path):
    Image.fromarray(photo(0)).save(tmp_path / name, **({"compression": "tiff_lzw"} if name == "lzw.tif" else {}))
    whole = (tmp_path / name).read_bytes()
    for fraction in (0.001, 0.3, 0.9):
        assert rejected(tmp_path / name, whole[: int(fraction * len(whole))])


def test_a_png_is_read_without_its_end_but_not_with_a_wrong_checksum(tmp_path):
    Image.fromarray(made := photo(0, 64, 64)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for missing in (12, 16):  # IEND; also the checksum of the pixels
        assert not rejected(tmp_path / "a.png", data[:-missing])
        assert np.array_equal(read(tmp_path / "a.png"), made)
    assert rejected(tmp_path / "a.png", data[:-30])
    assert rejected(tmp_path / "a.png", data[:-13] + bytes([data[-13] ^ 1]) + data[-12:])


HOLES = {  # file -> options, the fraction of holes that is noticed at least
    "a.png": ({}, 1.0),
    "a.gif": ({}, 1.0),
    "a.jpg": ({"quality": 80}, 0.9),
    "fine.jpg": ({"quality": 95, "subsampling": 0}, 0.9),
    "progressive.jpg": ({"quality": 80, "progressive": True}, 0.9),
    "a.webp": ({"quality": 80, "method": 0}, 0.9),
    "lossless.webp": ({"lossless": True, "method": 0}, 0.5),
}


@pytest.mark.parametrize("name", HOLES)
def test_holes_in_the_pixels_and_cut_files_are_noticed(name, tmp_path):
    """1 KiB of zeros or of random bytes. A progressive JPEG, cut, may be complete at a lower quality."""
    options, least = HOLES[name]
    Image.fromarray(photo(0)).save(tmp_path / name, **options)
    whole = (tmp_path / name).read_bytes()
    assert not rejected(tmp_path / name, whole)
    noticed = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        start = int(rng.integers(len(whole) // 20 + 700, len(whole) - 1024 - 20))
        hole = bytes(1024) if seed % 2 else rng.bytes(1024)
        noticed += rejected(tmp_path / name, whole[:start] + hole + whole[start + 1024 :])
    assert noticed / 30 >= least
    for fraction in (0.3, 0.6, 0.95):
        assert rejected(tmp_path / name, whole[: int(fraction * len(whole))])
