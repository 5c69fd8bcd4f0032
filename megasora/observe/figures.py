"""The headline figures of a run, as report.json holds them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from megasora.observe.run_data import ATTRIBUTES, RunData, Sample, to_float


def compute_figures(run: RunData) -> dict[str, Any]:
    """Python numbers, None where the run has no such figure."""
    throughput = run.metrics["tokens_per_second"]
    validation_losses = [to_float(line.get("loss")) for line in run.validations]
    figures = {
        "steps": int(run.steps[-1]),
        "first_val_loss": finite_or_none(validation_losses[0] if validation_losses else None),
        "final_val_loss": finite_or_none(validation_losses[-1] if validation_losses else None),
        "padding_fraction": padding_fraction(run),
        "tokens_per_second": finite_or_none(np.nanmedian(throughput)) if np.isfinite(throughput).any() else None,
    }
    for attribute in ATTRIBUTES:
        key = f"{attribute}_accuracy"
        figures[key] = finite_or_none(run.evaluation.get(key, accuracy(run.evaluated_samples, attribute)))
    held_out = [sample for sample in run.evaluated_samples if sample.held_out]
    for attribute in ATTRIBUTES:
        figures[f"held_out_{attribute}_accuracy"] = finite_or_none(accuracy(held_out, attribute))
    return figures


def padding_fraction(run: RunData) -> float | None:
    """Padding over all tokens of all packs, or None."""
    padding = run.metrics["padding_fraction"]
    # tokens_per_second counts tokens of clips; divided by 1 - padding they are the tokens of the packs
    tokens = run.metrics["tokens_per_second"] * run.metrics["time_step"] / (1 - np.minimum(padding, 1 - 1e-9))
    valid = np.isfinite(tokens) & np.isfinite(padding)
    return finite_or_none((padding * tokens)[valid].sum() / tokens[valid].sum()) if valid.any() else None


def accuracy(samples: Iterable[Sample], attribute: str) -> float | None:
    """Fraction of the samples with this attribute in which the detector recognized it; None without samples."""
    hits = [s.detected[attribute] == s.expected[attribute] for s in samples if attribute in s.expected]
    return sum(hits) / len(hits) if hits else None


def finite_or_none(value: Any) -> float | None:
    """A finite Python float, or None: JSON has no NaN."""
    value = to_float(value)
    return value if math.isfinite(value) else None
