"""Which values of a checkpoint are its weights: --weights names raw ones or an average of them."""

from __future__ import annotations

from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.errors import MegaSoraError

RAW = "raw"  # those of the last step, kind "weights"
AVERAGE = "ema"  # begins the kinds of averages


def kind_of(checkpoint: ShardedCheckpoint, weights: str) -> str:
    """The stored kind of `--weights`: raw, ema, or another average of the checkpoint, e.g. ema_0.999.

    Of imported weights, which have no average, raw and ema are "weights". Raises MegaSoraError if the checkpoint has no
    such average.
    """
    kind = checkpoint.stored_kind("weights" if weights == RAW else weights) if weights in (RAW, AVERAGE) else weights
    if kind not in checkpoint.kinds:
        raise MegaSoraError(
            f"{checkpoint.checkpoint} has no average {weights}; --weights may be {', '.join(names(checkpoint))}"
        )
    return kind


def names(checkpoint: ShardedCheckpoint) -> list[str]:
    """All values of --weights for this checkpoint."""
    return [RAW, *sorted(kind for kind in checkpoint.kinds if kind.startswith(AVERAGE))]
