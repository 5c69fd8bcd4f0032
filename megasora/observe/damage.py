"""Damaged clips of a run in tolerant mode: each is told of in RUN/damaged.jsonl, and too many of them end the run.

    what a rank left out of its packs --note--> lines; of all ranks, on the main process --add--> a verdict

Counted are clips, not encounters: one that comes again in the next epoch, or after a stop, is the same clip. The set is
part of a checkpoint, so neither ranks nor stops change when a run ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megasora.data.tar import DamagedTar
from megasora.observe.metrics import JsonLines

FILE = "damaged.jsonl"


class DamagedClips:
    """`fraction` of the run's `clips` may be damaged; `sample_ids`: those that were met before."""

    def __init__(self, run_dir: Path, fraction: float, clips: int, sample_ids: Iterable[int] = ()):
        self.run_dir, self.fraction, self.clips, self.sample_ids = run_dir, fraction, clips, set(sample_ids)

    def note(self, step: int, damaged: list[DamagedTar]) -> None:
        """A line for each clip that was left out in `step`; several processes append to the file, whole lines each."""
        if damaged:
            lines = JsonLines(self.run_dir / FILE)
            for error in damaged:
                facts = {"shard": error.path, "offset": error.offset, "sample_id": error.sample_id}
                lines.write({"step": step, **facts, "what": str(error)})
            lines.close()

    def add(self, met: list[tuple[int, str]]) -> str | None:
        """(sample id, what is wrong) of clips that were met; why the run cannot go on, or None while it can."""
        self.sample_ids |= {sample_id for sample_id, _ in met}
        if not met or len(self.sample_ids) <= self.fraction * self.clips:
            return None
        return (
            f"{len(self.sample_ids)} damaged clips are more than data.max_bad_fraction={self.fraction:g} of "
            f"{self.clips} clips; the last: {met[-1][1]}; mend the shards, or allow more"
        )
