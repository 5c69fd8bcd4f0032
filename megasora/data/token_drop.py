"""Token dropping (patch n' pack, arXiv 2307.06304): drops a fraction of the tokens of each training clip, so that more
clips fit into a pack. Off by default (`data.token_drop`).

The fraction changes linearly with the epochs, in one step per window of the packing plan, so that the length of a clip
is known before it is packed. Which tokens are kept is drawn again in each epoch, from (seed, epoch, sample id, first
token of the part) alone: neither the rank nor the other clips of the pack matter. A kept token keeps its position in
the clip, and with it its coords and its noise.
"""

from __future__ import annotations

import numpy as np

from megasora.config import TokenDropConfig
from megasora.data.shuffle import TOKENS, permutation


def drop_fraction_at(config: TokenDropConfig, epochs: float) -> float:
    """The fraction of a clip's tokens that is dropped after `epochs` epochs."""
    if epochs >= config.epochs:
        return config.end
    return config.start + (config.end - config.start) * epochs / config.epochs


def kept_token_counts(tokens_I: np.ndarray, fraction: float) -> np.ndarray:
    """int64 [I]: how many tokens of clips of `tokens_I` tokens are kept, at least one of each."""
    return tokens_I - np.floor(tokens_I * fraction).astype(np.int64)


def draw_positions(seed: int, epoch: int, sample_id: int, start: int, num_tokens: int, num_kept: int) -> np.ndarray:
    """int64 [num_kept], increasing: which positions of start .. start + num_tokens - 1 of a clip are kept."""
    return start + np.sort(permutation(num_tokens, seed, TOKENS, epoch, sample_id, start)[:num_kept])
