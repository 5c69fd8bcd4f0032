"""Image files to pixels: as they are shown, on a background if they are transparent, within the limits of size.

    bytes --open_image--> OpenClip of one picture, or of the frames of an animation (GIF, APNG, WebP, AVIF)

EXIF orientation and ICC profiles are applied, if they are valid. A file that is damaged is rejected.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction

import numpy as np

from megasora.config import IngestConfig
from megasora.data.animations import Animation, animation_clip
from megasora.data.compositing import Canvas, on_background
from megasora.data.frame_converter import Orientation
from megasora.data.gif_blocks import read_gif
from megasora.data.image_colors import ColorConverter
from megasora.data.image_damage import check_jpeg, check_webp, webp_delays
from megasora.data.media import ByteWindow, Media, OpenClip, RejectedClip, check_size, fitting_size
from megasora.data.png_chunks import PngFile, PngFrame, read_png

HDR_AVIF = re.compile(rb"colrnclx..\x00[\x10\x12]", re.DOTALL)  # transfer function PQ or HLG
HDR = "has the transfer function of HDR (PQ or HLG), which is not read"
ORIENTATION_TAG = 0x0112
UPRIGHT = Orientation(False, False, False)
ORIENTATIONS = {  # of EXIF: transposed, mirrored left to right, mirrored up to down
    2: Orientation(False, True, False),
    3: Orientation(False, True, True),
    4: Orientation(False, False, True),
    5: Orientation(True, False, False),
    6: Orientation(True, True, False),
    7: Orientation(True, True, True),
    8: Orientation(True, False, True),
}


def open_image(window: ByteWindow, media: Media, format: str, limits: IngestConfig) -> OpenClip:
    """Opens a file of an image format of Pillow: one frame and fps 0, or an animation. Raises RejectedClip."""
    with reject_damage(media):
        animation = OPENERS.get(format, open_still)(window, media, format, limits)
        if len(animation.delays) > 1:
            return animation_clip(animation, media, limits, lambda pixels: scaled(pixels, limits))
        (pixels,) = animation.pictures
    return OpenClip(0.0, iter((scaled(pixels, limits),)), [0.0], 1)


@contextmanager
def reject_damage(media: Media) -> Iterator[None]:
    """Turns errors of decoders into RejectedClip."""
    from PIL import Image

    try:
        yield
    except Image.DecompressionBombError as error:
        raise RejectedClip("too large", f"{media}: {error}") from None
    except Image.UnidentifiedImageError:
        raise RejectedClip("unreadable", f"{media} is not a readable image: it is cut or damaged") from None
    except (OSError, EOFError, ValueError, SyntaxError, RuntimeError, struct.error) as error:
        raise RejectedClip("unreadable", f"{media} is not a readable image: {error}") from None


def open_png(window: ByteWindow, media: Media, format: str, limits: IngestConfig) -> Animation:
    file = read_png(window)
    check_size(media, *file.size, 1, limits)
    if file.is_hdr:
        raise RejectedClip("hdr", f"{media} {HDR}")
    colors, orientation = ColorConverter(file.icc_profile), orientation_of(lambda: file.exif)
    areas = [frame.area for frame in file.frames]
    rgba = (png_pixels(file, frame, colors) for frame in file.frames)
    return Animation(
        *orientation.display_size(*file.size),
        [area.seconds for area in areas],
        drawn(media, file.size, areas, rgba, orientation),
    )


def png_pixels(file: PngFile, frame: PngFrame, colors: ColorConverter) -> np.ndarray:
    """uint8 [H, W, 3 or 4] of one picture."""
    from PIL import Image

    with Image.open(file.picture(frame), formats=["PNG"]) as image:
        level = image.info.get("transparency")  # as in the file, while Pillow scales pixels to 8 bits
        if isinstance(level, int) and image.mode == "L":
            image.info["transparency"] = level * 255 // (2**file.bit_depth - 1)
        elif isinstance(level, tuple) and file.bit_depth == 16:
            image.info["transparency"] = tuple(part >> 8 for part in level)
        return colors.rgba(image)


def open_gif(window: ByteWindow, media: Media, format: str, limits: IngestConfig) -> Animation:
    file = read_gif(window)
    check_size(media, *file.size, 1, limits)
    areas = [frame.area for frame in file.frames]
    for area in areas:
        check_size(media, area.height, area.width, 1, limits)
    rgba = (file.picture(frame) for frame in file.frames)
    return Animation(*file.size, [area.seconds for area in areas], drawn(media, file.size, areas, rgba, UPRIGHT))


def drawn(media: Media, size: tuple[int, int], areas: list, rgba: Iterator[np.ndarray], orientation) -> Iterator:
    """Yields uint8 [H, W, 3], what is shown with each frame."""
    with reject_damage(media):
        if len(areas) == 1 and (areas[0].height, areas[0].width) == size:
            yield orientation.apply(on_background(next(rgba)))
            return
        canvas = Canvas(*size)
        for area, pixels_HWC in zip(areas, rgba, strict=True):
            yield orientation.apply(canvas.draw(pixels_HWC, area))


def open_webp(window: ByteWindow, media: Media, format: str, limits: IngestConfig) -> Animation:
    data = bytes_of(window)
    image = open_with_pillow(window, media, format, limits)
    check_webp(data)
    delays = webp_delays(data) or [Fraction(0)]
    if len(delays) != image.n_frames:
        raise ValueError(f"it has {len(delays)} frames, of which {image.n_frames} can be read")
    return decoded(media, image, delays)


def open_avif(window: ByteWindow, media: Media, format: str, limits: IngestConfig) -> Animation:
    if HDR_AVIF.search(bytes_of(window)[: 1 << 16]):
        raise RejectedClip("hdr", f"{media} {HDR}")
    image = open_with_pillow(window, media, format, limits)
    check_size(media, image.height, image.width, 1 if media.is_excerpt else image.n_frames, limits)
    delays = []
    for number in range(image.n_frames):  # times are known once a picture is decoded
        image.seek(number)
        image.load()
        delays.append(Fraction(image.info["duration"], 1000))
    return decoded(media, image, delays)


def open_still(window: ByteWindow, media: Media, format: str, limits: IngestConfig) -> Animation:
    """The first picture of a JPEG, BMP or TIFF file."""
    image = open_with_pillow(window, media, format, limits)
    if format == "JPEG":
        check_jpeg(bytes_of(window))
    image.load()  # applies and removes the orientation of TIFF
    return decoded(media, image, [Fraction(0)])


OPENERS = {"PNG": open_png, "GIF": open_gif, "WEBP": open_webp, "AVIF": open_avif}


def open_with_pillow(window: ByteWindow, media: Media, format: str, limits: IngestConfig):
    from PIL import Image

    window.seek(0)
    image = Image.open(window, formats=[format])
    check_size(media, image.height, image.width, 1, limits)
    return image


def decoded(media: Media, image, delays: list[Fraction]) -> Animation:
    """The pictures of a file that Pillow draws."""
    orientation = orientation_of(image.getexif)
    colors = ColorConverter(image.info.get("icc_profile") or b"")

    def pictures() -> Iterator[np.ndarray]:
        with reject_damage(media), image:
            for number in range(len(delays)):
                if len(delays) > 1:
                    image.seek(number)
                image.load()
                yield orientation.apply(on_background(colors.rgba(image)))

    return Animation(*orientation.display_size(image.height, image.width), delays, pictures())


def bytes_of(window: ByteWindow) -> bytes:
    window.seek(0)
    return window.read()


def orientation_of(read_exif: Callable) -> Orientation:
    """What EXIF says; upright if it says nothing or cannot be read."""
    try:
        return ORIENTATIONS.get(read_exif().get(ORIENTATION_TAG), UPRIGHT)
    except Exception:  # its parser raises errors of many types, and viewers show such pictures
        return UPRIGHT


def scaled(pixels_HW3: np.ndarray, limits: IngestConfig) -> np.ndarray:
    """The picture within `limits.fit_height` x `fit_width`."""
    from PIL import Image

    height, width = fitting_size(*pixels_HW3.shape[:2], limits)
    if (height, width) == pixels_HW3.shape[:2]:
        return pixels_HW3
    return np.array(Image.fromarray(pixels_HW3).resize((width, height), Image.Resampling.LANCZOS))
