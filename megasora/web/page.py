"""The page: its fields and buttons, and what they do. Built with Gradio, which `server.py` imports.

fields --Form--> Studio.make --> result, message, gallery
"""

from __future__ import annotations

import random
import traceback
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasora.errors import MegaSoraError
from megasora.web.form import USES, Form
from megasora.web.gallery import clip_details, clip_view, gallery, message_box
from megasora.web.studio import Studio

if TYPE_CHECKING:
    from types import ModuleType

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
FONTS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif")
MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
VIDEO_TAB = "video"
MAX_SEED = 1 << 31  # of those drawn here


def build_theme(gradio: ModuleType) -> Any:
    """A theme with fonts of the machine: nothing is loaded."""
    return gradio.themes.Base(primary_hue="orange", neutral_hue="stone", font=FONTS, font_mono=MONO_FONTS)


def build_page(gradio: ModuleType, studio: Studio) -> Any:
    """The page of a studio, as Blocks of Gradio."""
    sample, gr = studio.session.settings, gradio
    with gr.Blocks(title=f"MegaSora: {studio.session.sampler.run}", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(f"<h1>MegaSora <span>{escape(studio.name)}</span></h1>", elem_id="head")
        with gr.Row(elem_id="main"):
            with gr.Column(scale=5, min_width=360, elem_id="form"):
                prompt = gr.Textbox(
                    label="Prompt", lines=3, max_lines=8, elem_id="prompt", placeholder="a red circle moves right"
                )
                with gr.Row(elem_id="buttons"):
                    make = gr.Button("Sample", variant="primary", elem_id="make", scale=3)
                    stop = gr.Button("Stop", elem_id="stop", scale=1)
                given = gr.Accordion("Given images or video", open=False, elem_id="given")
                with given, gr.Tabs() as tabs:
                    with gr.Tab("Images"), gr.Row():
                        image, last_image = (
                            gr.Image(
                                label=label, type="filepath", image_mode=None, format="png", height=150,
                                sources=["upload", "clipboard"], elem_id=name,
                            )
                            for label, name in (("First frame", "image"), ("Last frame", "last-image"))
                        )  # fmt: skip
                    with gr.Tab("Video", id=VIDEO_TAB):
                        video = gr.Video(label="Video", sources=["upload"], height=150, loop=True, elem_id="video")
                        use = gr.Radio(list(USES), value=next(iter(USES)), label="What to do with it", elem_id="use")
                        strength = gr.Slider(
                            0.05, 1, value=0.6, step=0.05, label="Strength",
                            info="of a change: low keeps much of the video, 1 nothing", elem_id="strength",
                        )  # fmt: skip
                with gr.Row():
                    size = gr.Textbox(
                        label="Size", placeholder=sample.size, info="height x width", max_lines=1, elem_id="size"
                    )
                    frames = gr.Number(
                        value=sample.frames, precision=0, label="Frames", info="new ones; 1: image", elem_id="frames"
                    )
                    fps = gr.Number(
                        value=sample.fps, label="Frames per second", info="without a given video", elem_id="fps"
                    )
                with gr.Row():
                    new_seed = gr.Button("new", elem_id="new-seed")
                    seed = gr.Number(
                        value=0, precision=0, label="Seed", info="another seed, another clip", buttons=[new_seed],
                        elem_id="seed",
                    )  # fmt: skip
                    guidance = gr.Number(
                        value=sample.guidance_scale, label="Guidance", info="1: none", elem_id="guidance"
                    )
                    steps = gr.Number(
                        value=sample.num_inference_steps, precision=0, label="Steps", info="of the solver",
                        elem_id="steps",
                    )  # fmt: skip
                negative = gr.Textbox(
                    label="Negative prompt", placeholder="what guidance moves away from", elem_id="negative"
                )
                expand = gr.Checkbox(
                    value=sample.expand != "none", label="Expand a short prompt into a caption of the training's style",
                    visible=studio.template is not None, elem_id="expand",
                )  # fmt: skip
            with gr.Column(scale=6, min_width=360, elem_id="result"):
                message = gr.HTML("", elem_id="message")
                result = gr.HTML(clip_view(None), elem_id="clip")
                details = gr.HTML("", elem_id="details")
                again = gr.Button("Use it as the given video", size="sm", visible=False, elem_id="again")
                last_file = gr.State(None)
        made = gr.HTML(gallery(studio.made()), elem_id="gallery")

        def make_clip(*values, progress=gr.Progress()):  # noqa: B008
            *fields, is_expanded = values
            form = Form(*fields)
            try:
                progress(0, desc="sampling")
                clip = studio.make(form, is_expanded, lambda fraction: progress(fraction, desc="sampling"))
            except (MegaSoraError, OSError) as error:
                return (message_box(form.message(error)), *(gr.skip() for _ in range(5)))
            except Exception as error:  # a fault of the program: its trace is for the terminal
                traceback.print_exc()
                text = f"{type(error).__name__}; the terminal of megasora web shows what failed"
                return (message_box(text), *(gr.skip() for _ in range(5)))
            is_video = clip.is_video
            shown = clip_view(clip), clip_details(clip)
            return "", *shown, gr.update(visible=is_video), str(clip.file) if is_video else None, gallery(studio.made())

        fields = [
            prompt, negative, image, last_image, video, use, strength, size, frames, fps, seed, guidance, steps, expand
        ]  # fmt: skip
        outputs = [message, result, details, again, last_file, made]
        gr.on(
            [make.click, prompt.submit], make_clip, fields, outputs, show_progress_on=[result], api_name="sample",
            concurrency_limit=1,
        )  # fmt: skip
        stop.click(studio.stop.set, queue=False, api_name=False)
        new_seed.click(lambda: random.randrange(MAX_SEED), outputs=seed, api_name=False)
        again.click(
            lambda file: (file, gr.update(open=True), gr.update(selected=VIDEO_TAB)), last_file, [video, given, tabs],
            api_name=False,
        )  # fmt: skip
        page.load(lambda: gallery(studio.made()), outputs=made, api_name=False)
    return page
