"""HTML of clips: the one that was made last, what its sidecar says, and the gallery of all."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from urllib.parse import quote

from megasora.web.studio import Clip

FILES = "gradio_api/file="  # the address of a file that the server may send, before its path


def address(clip: Clip) -> str:
    return FILES + quote(str(clip.file))


def picture(clip: Clip, css_class: str) -> str:
    """The video, which plays, or the image. The size sets its shape before it is loaded."""
    height, _, width = clip.text("size").partition("x")
    shape = f"aspect-ratio:{width}/{height}" if height.isdigit() and width.isdigit() else ""
    attributes = f'class="{css_class}" style="{shape}" src="{escape(address(clip))}"'
    if clip.is_video:
        return f"<video {attributes} autoplay loop muted playsinline></video>"
    return f'<img {attributes} alt="{escape(clip.text("prompt"))}">'


def clip_view(clip: Clip | None) -> str:
    if clip is None:
        return '<div class="empty">The clip appears here</div>'
    return picture(clip, "result")


def clip_details(clip: Clip) -> str:
    """What the clip shows, its file, and how it was made."""
    caption, prompt = clip.text("caption"), clip.text("prompt")
    expanded = f'<p class="caption">sampled as: {escape(caption)}</p>' if caption and caption != prompt else ""
    return (
        f'<p class="prompt">{escape(prompt)}</p>{expanded}<p class="facts">{escape(facts(clip))} · '
        f'<a href="{escape(address(clip))}" download="{escape(clip.file.name)}">{escape(clip.file.name)}</a></p>'
    )


def facts(clip: Clip) -> str:
    """One line: size, length, seed, settings."""
    values, settings = clip.values, clip.values.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    parts = [clip.text("size")]
    if clip.is_video:
        parts.append(f"{clip.text('frames')} frames at {clip.text('fps').removesuffix('.0')} fps")
    parts += [f"seed {values.get('seed', 0)}", f"guidance {settings.get('guidance_scale')}"]
    parts.append(f"{settings.get('num_inference_steps')} steps of {settings.get('solver')}")
    return " · ".join(parts) + (f" · {clip.text('kind')}" if clip.text("kind") != "text" else "")


def gallery(clips: Sequence[Clip]) -> str:
    """Tiles of clips, the first one first; a tile shows the prompt, and on hovering how the clip was made."""
    if not clips:
        return '<p class="none">Nothing was made yet.</p>'
    tiles = "".join(
        f'<a class="tile" href="{escape(address(clip))}" download="{escape(clip.file.name)}" '
        f'title="{escape(facts(clip))}">{picture(clip, "small")}<span>{escape(clip.text("prompt"))}</span></a>'
        for clip in clips
    )
    return f'<h2>Made so far</h2><div class="tiles">{tiles}</div>'


def message_box(text: str) -> str:
    return f'<div class="error" role="alert">{escape(text)}</div>'
