"""The charts on the report page: losses, speed, and optimizer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from megasora.observe.charts import (
    bin_color,
    chart,
    draw_line,
    draw_smoothed,
    placeholder_bin_color,
    placeholder_color,
    set_y_range,
    smoothed_chart,
)
from megasora.observe.curves import decimate, describe_smoothing, smooth, smoothing_window
from megasora.observe.formatting import percent, pluralize
from megasora.observe.page_elements import section
from megasora.observe.run_data import STEP_PHASES, RunData, to_float

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_TIME_INTERVALS = 160  # points of the stacked chart


def loss_section(run: RunData) -> str:
    charts = loss_chart(run, "Mean squared error of the predicted velocity.") + timestep_loss_chart(run)
    return section("loss", "Loss", f'<div class="charts">{charts}</div>')


def loss_chart(run: RunData, description: str) -> str:
    return training_chart("Training and validation loss", description, run, "loss")


def training_chart(
    title: str, description: str, run: RunData, key: str, scale: float = 1.0, may_be_log: bool = True
) -> str:
    """Chart of a figure that steps and validations have, times `scale`; "" if no value is finite."""
    values, steps, validation = scale * run.metrics[key], validation_steps(run), scale * validation_figures(run, key)
    if not np.isfinite(values).any() and not np.isfinite(validation).any():
        return ""

    def draw(axes: Axes) -> None:
        draw_smoothed(axes, run.steps, values)
        draw_line(axes, steps, validation, placeholder_color("second"))
        smoothed = smooth(values, smoothing_window(values))
        set_y_range(axes, values, [smoothed, validation], may_be_log=may_be_log)

    legend = [("var(--accent)", f"training, {describe_smoothing(values)}")]
    if np.isfinite(validation).any():
        legend.append(("var(--second)", f"validation, {pluralize(len(steps), 'time')}"))
    return chart(title, f"{description} Faint: every step.", legend, draw)


def timestep_loss_chart(run: RunData) -> str:
    """The validation loss of each timestep bin; "" if there was no validation."""
    losses = [{(b["low"], b["high"]): to_float(b["loss"]) for b in v.get("bins") or []} for v in run.validations]
    bins, steps = sorted(set().union(*losses)), validation_steps(run)
    if not bins:
        return ""
    curves = [np.array([by_bin.get(edges, math.nan) for by_bin in losses]) for edges in bins]

    def draw(axes: Axes) -> None:
        for index, curve in enumerate(curves):
            draw_line(axes, steps, curve, placeholder_bin_color(index, len(curves)))
        set_y_range(axes, np.array([]), curves)

    legend = [
        (bin_color(index, len(bins)), f"{low:.2g}\N{EN DASH}{high:.2g}: {curves[index][-1]:.3f}")
        for index, (low, high) in enumerate(bins)
    ]
    description = "Fixed clips and noise; t = 0 is clean, t = 1 is noise. With the last loss of each bin."
    return chart("Validation loss by timestep", description, legend, draw)


def validation_steps(run: RunData) -> np.ndarray:
    return np.array([line["step"] for line in run.validations])


def validation_figures(run: RunData, key: str) -> np.ndarray:
    """float [validations]; NaN where a validation has no such figure."""
    return np.array([to_float(line.get(key)) for line in run.validations])


def speed_section(run: RunData) -> str:
    description = "Tokens of clips, without padding, of all processes. Faint: every step."
    charts = smoothed_chart("Throughput", description, "tokens per second", run, run.metrics["tokens_per_second"])
    return section("speed", "Speed", f'<div class="charts">{charts}{step_time_chart(run)}{mfu_chart(run)}</div>')


def mfu_chart(run: RunData) -> str:
    description = "Model FLOPs utilization: the model's FLOPs in % of the GPUs' peak."
    return smoothed_chart("MFU", description, "MFU", run, 100 * run.metrics["mfu"])


def step_time_chart(run: RunData) -> str:
    """The phases of a step, stacked, in milliseconds."""
    m = run.metrics
    names, seconds = list(STEP_PHASES), np.nan_to_num([m[f"time_{phase}"] for phase in STEP_PHASES])
    rest = np.nan_to_num(m["time_step"]) - seconds.sum(axis=0)
    if rest.sum() > 0.01 * np.nansum(m["time_step"]):
        names, seconds = [*names, "other"], np.vstack((seconds, np.maximum(rest, 0)))
    intervals = np.array_split(np.arange(len(run.steps)), min(len(run.steps), MAX_TIME_INTERVALS))
    x = [run.steps[interval].mean() for interval in intervals]
    stacked = 1e3 * np.array([[phase[interval].mean() for interval in intervals] for phase in seconds])

    def draw(axes: Axes) -> None:
        axes.stackplot(x, stacked, colors=[placeholder_color(name) for name in names], linewidth=0)
        set_y_range(axes, stacked.sum(axis=0), from_zero=True)

    fractions = seconds.sum(axis=1) / max(seconds.sum(), 1e-12)
    legend = [(f"var(--{n})", f"{n} {percent(fraction)}") for n, fraction in zip(names, fractions, strict=True)]
    mean = 1e3 * seconds.sum() / len(run.steps)
    description = f"Milliseconds; {mean:.3g} ms on average. With the fraction of each phase."
    return chart("Time of a step", description, legend, draw)


def optimizer_section(run: RunData) -> str:
    charts = gradient_norm_chart(run) + learning_rate_chart(run)
    description = "Fraction of the tokens of all packs, in %."
    charts += smoothed_chart("Padding", description, "padding", run, 100 * run.metrics["padding_fraction"])
    return section("optimizer", "Optimizer and packs", f'<div class="charts three">{charts}</div>')


def gradient_norm_chart(run: RunData) -> str:
    norms, max_norm = run.metrics["grad_norm"], to_float(run.config.get("optim.max_grad_norm"))
    description = "Global norm before clipping."
    if math.isfinite(max_norm) and np.isfinite(norms).any():
        clipped = np.mean(norms[np.isfinite(norms)] > max_norm)
        description += f" Above optim.max_grad_norm = {max_norm:g} in {percent(clipped)} of the steps."
    return smoothed_chart("Gradient norm", description, "gradient norm", run, norms, from_zero=False)


def learning_rate_chart(run: RunData) -> str:
    lr, config = run.metrics["lr"], run.config

    def draw(axes: Axes) -> None:
        draw_line(axes, *decimate(run.steps, lr), placeholder_color("accent"))
        set_y_range(axes, lr, from_zero=True)

    warmup, min_ratio = config.get("optim.warmup_steps"), config.get("optim.min_lr_ratio")
    description = f"Warm-up of {warmup} steps, then a cosine down to {min_ratio} of optim.lr."
    return chart("Learning rate", description, [("var(--accent)", "lr")], draw)
