"""Token dropping (patch n' pack, arXiv 2307.06304): a part of a training clip's tokens is left out, so that more clips
fit into a pack. Off by default.

The rate moves in a straight line with the epochs, in one stair a window of the plan, so that how long a clip is can be
known before it is packed. Which tokens stay is drawn anew in each epoch, from (seed, epoch, sample id, place) alone:
neither the rank nor what else is in the pack matters. What stays keeps its place in the clip, and with it its coords
and its noise.
"""

from __future__ import annotations

import numpy as np

from megasora.config import DropConfig
from megasora.data.shuffle import TOKENS, shuffled


def rate_at(config: DropConfig, epochs: float) -> float:
    """The fraction of a clip's tokens that is left out after `epochs` epochs."""
    if epochs >= config.epochs:
        return config.end
    return config.start + (config.end - config.start) * epochs / config.epochs


def kept_tokens(tokens_N: np.ndarray, rate: float) -> np.ndarray:
    """int64: how many tokens stay of clips of `tokens_N`, at least one of each."""
    return tokens_N - np.floor(tokens_N * rate).astype(np.int64)


def kept_places(seed: int, epoch: int, sample_id: int, first: int, tokens: int, kept: int) -> np.ndarray:
    """int64 [kept], increasing: which of the places `first .. first + tokens - 1` of a clip stay."""
    return first + np.sort(shuffled(tokens, seed, TOKENS, epoch, sample_id, first)[:kept])
