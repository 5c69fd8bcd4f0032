"""Damaged clips of a run with `data.max_damaged_fraction` > 0: logged in RUN/damaged.jsonl; too many end the run.

    clips that a rank skipped --log--> RUN/damaged.jsonl; those of all ranks --register--> DataError if too many

Distinct clips are counted: a clip that is met again in the next epoch or after a resume counts once. The set is part of
the checkpoint, so neither the number of ranks nor a resume changes when a run ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megasora.data.tar import DamagedTar
from megasora.errors import DataError
from megasora.jsonl import JsonlWriter

FILE = "damaged.jsonl"


class DamagedClips:
    """The damaged clips of a run of `clips` clips, of which the fraction `fraction` is tolerated.

    `sample_ids`: the damaged clips met before the resume.
    """

    def __init__(self, run_dir: Path, fraction: float, clips: int, sample_ids: Iterable[int] = ()):
        self.run_dir, self.fraction, self.clips, self.sample_ids = run_dir, fraction, clips, set(sample_ids)

    def log(self, step: int, damaged: list[DamagedTar]) -> None:
        """Appends one line per clip that this rank skipped in `step`. Several processes may append to the file."""
        if damaged:
            writer = JsonlWriter(self.run_dir / FILE)
            for error in damaged:
                location = {"shard": error.path, "offset": error.offset, "sample_id": error.sample_id}
                writer.write({"step": step, **location, "error": str(error)})
            writer.close()

    def register(self, damaged: list[tuple[int, str]]) -> None:
        """Counts the damaged clips of all ranks, as (sample id, error). Raises DataError when they are too many."""
        self.sample_ids |= {sample_id for sample_id, _ in damaged}
        if damaged and len(self.sample_ids) > self.fraction * self.clips:
            raise DataError(
                f"{len(self.sample_ids)} damaged clips are more than data.max_damaged_fraction={self.fraction:g} of "
                f"{self.clips} clips; the last: {damaged[-1][1]}; repair the shards, or allow more"
            )
