"""Headline figures that every run has: losses, steps, parameters."""

from __future__ import annotations

from typing import Any

import numpy as np

from megasora.observe.curves import smooth, smoothing_window
from megasora.observe.formatting import NBSP, compact, format_duration
from megasora.observe.page_elements import tile
from megasora.observe.run_data import RunData


def loss_tile(run: RunData, figures: dict[str, Any]) -> str:
    """The first and the last validation loss, or the training loss of a run that was not validated yet."""
    first, last = figures["first_val_loss"], figures["final_val_loss"]
    if first and last is not None:
        change = f"{100 * (last / first - 1):+.0f}{NBSP}%".replace("-", "\N{MINUS SIGN}")
        description = f"at step {run.validations[0]['step']:,} and {run.validations[-1]['step']:,}, {change}"
        return tile("Validation loss", f"<small>{first:.3f} →</small> {last:.3f}", description)
    loss = smooth(run.metrics["loss"], smoothing_window(run.steps))[-1]
    return tile("Training loss", f"{loss:.3f}", "mean of the last steps; not validated yet")


def steps_tile(run: RunData) -> str:
    planned, steps = run.config.get("run.steps"), int(run.steps[-1])
    description = f"{format_duration(float(np.nansum(run.metrics['time_step'])))} of training"
    if planned not in (None, steps):
        description = f"of {planned:,}; {description}"
    return tile("Steps", f"{steps:,}", description)


def parameter_tiles(run: RunData) -> list[str]:
    """One tile, or none if run.json does not say it."""
    count = int(run.run_info.get("parameters", 0))
    return [tile("Parameters", compact(count), f"{count:,}")] if count else []
