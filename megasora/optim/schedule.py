"""Learning rate schedule: linear warm-up, then a half cosine that ends at `min_lr_ratio * lr` on the last step."""

from __future__ import annotations

import math

from megasora.config import OptimConfig


def lr_at(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of update `step`, counted from 0, of `steps`. It is positive from the first update on."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    low = config.min_lr_ratio
    return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
