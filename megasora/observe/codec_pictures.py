"""The reconstructions on the report page: the newest picture, large, and the earlier ones behind a slider."""

from __future__ import annotations

import base64
import math

from megasora.observe.codec_run_data import Picture
from megasora.observe.formatting import NBSP
from megasora.observe.page_elements import escape, section
from megasora.observe.run_data import RunData, to_float

PIXELATED = 1024  # px; pictures up to this width are enlarged without interpolation
MAX_ZOOM = 2
LEAD = (
    "Held-out clips through the codec: originals, reconstructions, and four times their difference, where grey is none."
)


def pictures_section(run: RunData, pictures: list[Picture]) -> str:
    """HTML; "" without a picture."""
    if not pictures:
        return ""
    figures = {line["step"]: line for line in run.validations}
    newest = len(pictures) - 1
    slides = "".join(
        slide(picture, figures.get(picture.step, {}), index == newest) for index, picture in enumerate(pictures)
    )
    controls = ""
    if newest:
        controls = (
            f'<label class="steps" hidden><span>step {pictures[0].step:,}</span><input type="range" id="slide" min="0" '
            f'max="{newest}" value="{newest}" aria-label="step"><span>step {pictures[-1].step:,}</span></label>'
        )
    return section("reconstructions", "Reconstructions", f'<div class="card slides">{slides}{controls}</div>', LEAD)


def slide(picture: Picture, figures: dict, is_shown: bool) -> str:
    """One picture, embedded, with the step and the figures of its validation."""
    psnr, ssim = to_float(figures.get("psnr")), to_float(figures.get("ssim"))
    details = [f"{psnr:.2f}{NBSP}dB"] if math.isfinite(psnr) else []
    details += [f"SSIM{NBSP}{ssim:.4f}"] if math.isfinite(ssim) else []
    caption = f"<strong>Step {picture.step:,}</strong>" + "".join(f"<span>{escape(text)}</span>" for text in details)
    hidden, shown = "" if is_shown else " hidden", image(picture, f"reconstructions after step {picture.step:,}")
    return f'<figure class="slide"{hidden}><figcaption>{caption}</figcaption>{shown}</figure>'


def image(picture: Picture, alt: str) -> str:
    """The picture, embedded."""
    css_class = ' class="pixels"' if picture.width <= PIXELATED else ""
    data = base64.b64encode(picture.data).decode("ascii")
    size = f'width="{picture.width}" height="{picture.height}" style="max-width:{MAX_ZOOM * picture.width}px"'
    return f'<img{css_class} {size} alt="{escape(alt)}" src="data:image/png;base64,{data}">'
