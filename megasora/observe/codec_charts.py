"""The charts of a codec run: terms of the loss, figures of validations, codebook, statistics of the latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megasora.observe.charts import chart, draw_line, placeholder_color, set_y_range
from megasora.observe.codec_run_data import CodecFiles, num_codes
from megasora.observe.curves import decimate, describe_smoothing, smooth, smoothing_window
from megasora.observe.formatting import compact, pluralize
from megasora.observe.report_curves import training_chart, validation_figures, validation_steps
from megasora.observe.run_data import LOSS_TERMS, RunData, to_float

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST_TERM = 1e-3  # of the largest: what adds less to the loss is not drawn
COLORS = ("accent", "good", "second", "optimizer", "data", "backward", "backward", "other", "muted")
TERM_COLORS = dict(zip(LOSS_TERMS, COLORS, strict=True))
DISCRIMINATOR = ("adversarial", "discriminator")


def lines_chart(
    title: str,
    description: str,
    run: RunData,
    curves: dict[str, np.ndarray],
    labels: list[str],
    least_of_high: float = 0.0,
) -> str:
    """Chart of the running means of several values per step; `curves`: by name in TERM_COLORS; "" without any."""
    if not curves:
        return ""
    smoothed = {name: smooth(values, smoothing_window(values)) for name, values in curves.items()}

    def draw(axes: Axes) -> None:
        for name, values in smoothed.items():
            draw_line(axes, *decimate(run.steps, values), placeholder_color(TERM_COLORS[name]))
        set_y_range(axes, np.array([]), list(smoothed.values()), least_of_high=least_of_high)

    legend = [(f"var(--{TERM_COLORS[name]})", label) for name, label in zip(curves, labels, strict=True)]
    return chart(title, description, legend, draw)


def loss_terms_chart(run: RunData) -> str:
    """What each term adds to the loss: its value times its weight; SSIM is 1 for equal frames."""
    curves, labels = {}, []
    for name in LOSS_TERMS:
        weight = to_float(run.config.get(f"reconstruction.{name}"))
        values = run.metrics[name]
        if weight > 0 and np.isfinite(values).any():
            text, values = ("(1 - ssim)", 1 - values) if name == "ssim" else (name, values)
            curves[name] = weight * values
            labels.append(f"{weight:g} × {text}: {compact(curves[name][np.isfinite(values)][-1])}")
    description = f"Weight × value of each, {describe_smoothing(run.steps)}. With the last value."
    return lines_chart("Terms of the loss", description, run, curves, labels, LEAST_TERM)


def discriminator_chart(run: RunData) -> str:
    curves = {name: run.metrics[name] for name in DISCRIMINATOR if np.isfinite(run.metrics[name]).any()}
    description = f"Loss of the decoder against the discriminator, and its own; {describe_smoothing(run.steps)}."
    return lines_chart("Discriminator", description, run, curves, list(curves))


def validation_chart(title: str, description: str, run: RunData, key: str) -> str:
    """Chart of a figure that only validations have; "" if no value is finite."""
    values, steps = validation_figures(run, key), validation_steps(run)
    if not np.isfinite(values).any():
        return ""

    def draw(axes: Axes) -> None:
        draw_line(axes, steps, values, placeholder_color("second"))
        set_y_range(axes, np.array([]), [values])

    return chart(title, description, [("var(--second)", f"validation, {pluralize(len(steps), 'time')}")], draw)


def codebook_chart(run: RunData) -> str:
    """Perplexity of the codes in % of their number; "" without a codebook."""
    codes = num_codes(run)
    if not codes:
        return ""
    description = f"exp(entropy) of the codes of a step, in % of the {codes:,} codes."
    return training_chart("Codebook use", description, run, "perplexity", 100 / codes)


def latents_chart(files: CodecFiles) -> str:
    """Mean and standard deviation of each channel before normalisation; "" if the codec is not finished."""
    statistics = files.channel_statistics
    if statistics is None:
        return ""
    mean, std = statistics
    channels = np.arange(len(mean))

    def draw(axes: Axes) -> None:
        axes.bar(channels, std, width=0.72, color=placeholder_color("accent"), linewidth=0)
        size = float(np.clip(160 / len(mean), 1.5, 6))
        axes.plot(channels, mean, "o", color=placeholder_color("second"), markersize=size)
        axes.axhline(0, color=placeholder_color("muted"), linewidth=0.8)
        low, high = min(0.0, mean.min()), max(mean.max(), std.max(), 0.0)
        margin = 0.06 * (high - low) or 1.0
        axes.set_ylim(low - margin if low < 0 else 0.0, high + margin)

    legend = [("var(--accent)", "standard deviation"), ("var(--second)", "mean")]
    description = "Over training clips, before normalisation: the DiT gets (z - mean) / std."
    return chart("Each latent channel", description, legend, draw, "channel")
