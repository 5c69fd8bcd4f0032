"""Mean and standard deviation of the latents of a codec, channel by channel, over clips of any length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np


class LatentStatistics:
    """Sums over latent frames, in float64."""

    def __init__(self, channels: int):
        self.count = 0  # positions
        self.sum_C, self.square_sum_C = np.zeros(channels), np.zeros(channels)

    def observe(self, latents: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Adds latent frames [h, w, C], and yields them."""
        for latent in latents:
            values = latent.reshape(-1, latent.shape[2]).astype(np.float64)
            self.count += len(values)
            self.sum_C += values.sum(0)
            self.square_sum_C += np.square(values).sum(0)
            yield latent

    def add(self, other: LatentStatistics) -> None:
        """Adds the latents of another clip."""
        self.count += other.count
        self.sum_C += other.sum_C
        self.square_sum_C += other.square_sum_C

    def totals(self) -> tuple[list[float], list[float]]:
        """(mean, standard deviation) of each channel."""
        mean_C = self.sum_C / self.count
        variance_C = np.maximum(self.square_sum_C / self.count - np.square(mean_C), 0)
        return mean_C.tolist(), np.sqrt(variance_C).tolist()
