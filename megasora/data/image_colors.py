"""Decoded pictures of Pillow, of any mode, to 8-bit sRGB with alpha."""

from __future__ import annotations

import io

import numpy as np

GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")  # modes of Pillow
MODES_OF_PROFILE = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # color space of an ICC profile -> mode of Pillow
SRGB_TOLERANCE = 2  # grey levels; a profile that changes no color by more is sRGB


class ColorConverter:
    """Converts pictures with one ICC profile, which may be missing; one that is not valid is ignored, as viewers do."""

    def __init__(self, icc_profile: bytes):
        self.mode, self.transform = build_transform(icc_profile) if icc_profile else ("", None)

    def rgba(self, image) -> np.ndarray:
        """uint8 [H, W, 3], or [H, W, 4] if some pixels may be transparent. ValueError for modes that are not read."""
        image, alpha = split_alpha(image)
        if self.transform is not None:
            from PIL import ImageCms

            if self.mode == "RGB" and image.mode == "L":
                image = image.convert("RGB")
            if self.mode == image.mode:
                image = ImageCms.applyTransform(image, self.transform)
        rgb_HW3 = np.array(image.convert("RGB"))
        return rgb_HW3 if alpha is None else np.dstack([rgb_HW3, alpha])


def split_alpha(image) -> tuple:
    """A picture of mode L, RGB, CMYK or another that converts to RGB, and its alpha, uint8 [H, W] or None."""
    if image.mode in GREY_16:
        return split_grey_16(image)
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits")
    if image.mode in ("LA", "La"):
        image = image.convert("LA")
        return image.getchannel("L"), np.asarray(image.getchannel("A"))
    if image.mode in ("RGBA", "RGBa", "PA") or image.has_transparency_data:
        image = image.convert("RGBA")
        return image.convert("RGB"), np.asarray(image.getchannel("A"))
    if image.mode in ("P", "1"):
        image = image.convert("RGB" if image.mode == "P" else "L")
    return image, None


def split_grey_16(image) -> tuple:
    """The same for a grey picture of 16 bits; one level may be transparent."""
    from PIL import Image

    levels_HW = np.asarray(image)
    grey_HW = ((levels_HW.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    transparent = image.info.get("transparency")
    alpha = None if transparent is None else np.where(levels_HW == transparent, 0, 255).astype(np.uint8)
    return Image.fromarray(grey_HW), alpha


def build_transform(icc_profile: bytes) -> tuple:
    """The mode that a profile describes, and its transform to sRGB; None if it is not valid, or sRGB itself."""
    from PIL import Image, ImageCms

    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        mode = MODES_OF_PROFILE[profile.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(
            profile,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError, TypeError):
        return "", None
    if mode == "RGB":
        steps = np.linspace(0, 255, 9).astype(np.uint8)
        colors_HW3 = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3)
        converted_HW3 = np.asarray(ImageCms.applyTransform(Image.fromarray(colors_HW3), transform))
        if np.abs(converted_HW3.astype(int) - colors_HW3).max() <= SRGB_TOLERANCE:
            return "", None
    return mode, transform
