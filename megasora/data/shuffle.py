"""Permutations that follow from the run's seed and a key, on every machine and in every version of numpy.

They are the raw output of a bit generator, which numpy keeps the same in all its versions, unlike that of its shuffles.
"""

from __future__ import annotations

import numpy as np

ORDER, INTERLEAVE, STEPS, GROUPS, TOKENS = range(5)  # what is drawn: the first number of a key


def shuffled(count: int, seed: int, *key: int) -> np.ndarray:
    """int64 [count]: a permutation that depends on (seed, key) alone."""
    drawn = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)
    return np.argsort(drawn, kind="stable")
