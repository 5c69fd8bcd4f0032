"""The report page of a run that trains a codec: reconstructions, quality, losses, codebook, latents, speed."""

from __future__ import annotations

from typing import Any

import numpy as np

from megasora.observe.charts import smoothed_chart
from megasora.observe.codec_charts import (
    codebook_chart,
    discriminator_chart,
    latents_chart,
    loss_terms_chart,
    validation_chart,
)
from megasora.observe.codec_pictures import image, pictures_section
from megasora.observe.codec_run_data import (
    MAX_CLIPS,
    CodecFiles,
    compute_codec_figures,
    num_codes,
    read_codec_files,
)
from megasora.observe.formatting import NBSP, compact, percent, pluralize
from megasora.observe.page_elements import Page, escape, section, tile
from megasora.observe.report_curves import (
    gradient_norm_chart,
    learning_rate_chart,
    mfu_chart,
    step_time_chart,
    training_chart,
)
from megasora.observe.run_data import RunData, to_float
from megasora.observe.run_tiles import loss_tile, parameter_tiles, steps_tile

EVALUATED = {"psnr": "PSNR, dB", "ssim": "SSIM", "flicker": "flicker"}  # figures of a clip -> column


def codec_page(run: RunData) -> Page:
    files = read_codec_files(run)
    figures = compute_codec_figures(run, files)
    sections = [
        pictures_section(run, files.pictures),
        charts_section("quality", "Quality", quality_charts(run)),
        charts_section("loss", "Loss", loss_charts(run)),
        latents_section(run, files),
        evaluation_section(files),
        charts_section("speed", "Speed", speed_charts(run)),
        charts_section("optimizer", "Optimizer", [gradient_norm_chart(run), learning_rate_chart(run)]),
    ]
    tiles = [quality_tiles(run, figures), [steps_tile(run), *speed_tiles(figures), *parameter_tiles(run)]]
    clips = run.config.get("data.clips")
    data = f"It reads the clips in <code>{escape(clips)}</code>, without captions and shards." if clips else ""
    return Page(figures, tiles, sections, "megasora.train_codec", data)


def charts_section(anchor: str, title: str, charts: list[str], lead_html: str = "") -> str:
    """A section of those charts that are not ""; "" without any."""
    shown = list(filter(None, charts))
    css_class = "charts three" if len(shown) > 2 else "charts"
    return section(anchor, title, f'<div class="{css_class}">{"".join(shown)}</div>', lead_html) if shown else ""


def quality_tiles(run: RunData, figures: dict[str, Any]) -> list[str]:
    """PSNR, SSIM, loss, compression, and the use of the codebook if there is one."""
    tiles = []
    if figures["final_psnr"] is not None:
        first = "" if figures["first_psnr"] is None else f"<small>{figures['first_psnr']:.1f} →</small> "
        description = f"of held-out clips, at step {run.validations[-1]['step']:,}"
        tiles.append(tile("PSNR", f"{first}{figures['final_psnr']:.2f}{NBSP}dB", description))
    if figures["final_ssim"] is not None:
        tiles.append(tile("SSIM", f"{figures['final_ssim']:.4f}", "of held-out clips; 1: identical"))
    tiles.append(loss_tile(run, figures))
    ft, fh, fw = run.config["codec.factors"]
    channels = pluralize(run.config["codec.channels"], "channel")
    description = f"fewer numbers: {ft} × {fh} × {fw} pixels to {channels}"
    tiles.append(tile("Compression", f"{figures['compression']:.3g} ×", description))
    if figures["codebook_use"] is not None:
        use = figures["codebook_use"]
        meter = f'<div class="meter"><i style="width:{100 * min(max(use, 0), 1):.1f}%"></i></div>'
        tiles.append(tile("Codebook use", percent(use), f"perplexity / {num_codes(run):,} codes", meter))
    return tiles


def speed_tiles(figures: dict[str, Any]) -> list[str]:
    speed = figures["clips_per_second"]
    return [] if speed is None else [tile("Clips per second", compact(speed), "median, all processes")]


def quality_charts(run: RunData) -> list[str]:
    return [
        training_chart("PSNR", "Peak signal to noise ratio of the reconstructions, dB.", run, "psnr", may_be_log=False),
        training_chart("SSIM", "Structural similarity; 1 is identical.", run, "ssim", may_be_log=False),
        validation_chart("Flicker", "Error of the differences between frames, held-out clips.", run, "flicker"),
    ]


def loss_charts(run: RunData) -> list[str]:
    loss = training_chart("Training and validation loss", "The sum of the weighted terms.", run, "loss")
    return [loss, loss_terms_chart(run), discriminator_chart(run)]


def speed_charts(run: RunData) -> list[str]:
    speed, description = run.metrics["clips_per_second"], "Clips of all processes. Faint: every step."
    throughput = smoothed_chart("Throughput", description, "clips per second", run, speed)
    return [throughput, step_time_chart(run), mfu_chart(run)]


def latents_section(run: RunData, files: CodecFiles) -> str:
    """Codebook use, and the statistics that the finished codec divides its latents by."""
    codec, lead = files.codec, ""
    if digest := codec.get("encoder_sha256"):
        lead = (
            f"<code>codec/</code> holds the codec of step {codec.get('step', 0):,}; the SHA-256 of its encoder begins "
            f"with <code>{escape(digest[:16])}</code>."
        )
    return charts_section("latents", "Latents", [codebook_chart(run), latents_chart(files)], lead)


def evaluation_section(files: CodecFiles) -> str:
    """The table of eval/eval.json and the sheet, which `megasora codec eval` wrote; "" without them."""
    total = files.evaluation.get("total")
    if total is None:
        return ""
    clips = [clip for clip in files.evaluation.get("clips", []) if isinstance(clip, dict)]
    rows = [(f"{len(clips):,} clips", total), *((str(clip.get("clip", "")), clip) for clip in clips[:MAX_CLIPS])]
    body = ""
    for name, values in rows:
        numbers = [to_float(values.get(key)) for key in EVALUATED]
        cells = "".join(f"<td>{'-' if np.isnan(n) else f'{n:.4g}'}</td>" for n in numbers)
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    head = "".join(f'<th scope="col">{name}</th>' for name in ("clip", *EVALUATED.values()))
    table = f'<table class="settings"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    sheet = ""
    if files.sheet:
        summary = "<summary>originals, reconstructions and differences of some clips</summary>"
        sheet = f'<details class="card sheet">{summary}{image(files.sheet, "contact sheet")}</details>'
    lead = f"By <code>megasora codec eval</code>, split {escape(files.evaluation.get('split', 'unknown'))}."
    speeds = [to_float(total.get(f"{name}_frames_per_cpu_second")) for name in ("encode", "decode")]
    if np.isfinite(speeds).all():
        lead += f" Frames per CPU second: {compact(speeds[0])} encoded, {compact(speeds[1])} decoded."
    if len(clips) > MAX_CLIPS:
        lead += f" The first {MAX_CLIPS} of {len(clips):,} clips."
    return section("evaluation", "Evaluation", f'<div class="card scroll">{table}</div>{sheet}', lead)
