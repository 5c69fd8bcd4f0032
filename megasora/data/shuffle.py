"""Permutations as a pure function of the run's seed and a key, the same on every machine and in every version of numpy.

They sort the raw output of a bit generator, which numpy keeps stable across versions, unlike its own shuffles.
"""

from __future__ import annotations

import numpy as np

ORDER, INTERLEAVE, STEPS, GROUPS, TOKENS, CLIPS, CROPS = range(7)  # first element of a key: what is drawn


def permutation(count: int, seed: int, *key: int) -> np.ndarray:
    """int64 [count]: a random permutation of 0 .. count - 1 that depends on (seed, key) alone."""
    random = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)
    return np.argsort(random, kind="stable")
