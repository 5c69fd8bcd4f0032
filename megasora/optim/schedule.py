"""The learning rate at a step: linear warm-up, then half a cosine that reaches `final_rate * rate` as the run ends."""

from __future__ import annotations

import math

from megasora.config import OptimConfig


def rate_at(step: int, steps: int, config: OptimConfig) -> float:
    """`step` counts from 0, the first update; the warm-up does not start at zero, which would waste it."""
    if step < config.warmup:
        return config.rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    low = config.final_rate
    return config.rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
