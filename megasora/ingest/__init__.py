"""`megasora ingest`: clips and captions to shards.

sources.py   a folder, a list or tars        -> clips in the order that numbers them
division.py  which blocks of them are ours; what the whole ingest is, written once
pool.py      jobs to child processes, results in order; a crash costs one clip
worker.py    in a child: bytes -> frames -> stages.py -> codec -> patches in a file
run.py       blocks written one after the other, the manifest behind the last
summary.py   what was taken and what was not, and why
scenes.py, duplicates.py   for tools/list_clips.py, which writes lists
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megasora.config import Config
    from megasora.data.shards import Manifest
    from megasora.ingest.division import Part


def ingest(source: Path, out: Path, config: Config, part: Part | None = None) -> Manifest | None:
    """`source` to shards in `out`; of several parts, the one that completes them writes the manifest and returns it.

    What is complete is not done again. Raises MegaSoraError.
    """
    from megasora.ingest.run import run_ingest

    return run_ingest(Path(source), Path(out), config, part)
