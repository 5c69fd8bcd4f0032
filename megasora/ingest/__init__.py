"""`megasora ingest`: turns clips and captions into shards.

driver.py            runs an ingest: blocks in order, then the manifest
sources.py           a folder, a list or tars -> listing.py: clips in the order of sample ids, counts of other files
walk.py              the files below a folder, also through links
file_roles.py        which files are clips, captions, thumbnails; file_counts.py counts them
clip_folder.py, clip_list.py, clip_tars.py   the clips of each kind of source, with their captions.py
parts.py             the blocks that each process writes
output_folder.py     ingest.json, and the checks that all processes run the same ingest
caption_encoding.py  captions are checked and encoded before clips are decoded
pool.py              jobs to worker processes, results in order; a crash costs one clip
worker.py            in a worker: bytes -> frames -> filters.py -> codec -> float16.py -> patches in a file
codec_process.py     the network of a learned codec, for workers; codec_pool.py starts and ends such processes,
                     remote_encoder.py calls them from a worker, codec_messages.py is what goes between
child_process.py     how workers and codec processes start and die
results.py           EncodedClip or Rejection: what a worker returns
summary.py           counts of rejected clips, and the report at the end
library_warnings.py  what libraries print, counted by kind
scenes.py, duplicates.py   for tools/list_clips.py
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megasora.config import Config
    from megasora.data.shard_format import Manifest
    from megasora.ingest.parts import Part


def ingest(source: Path, out: Path, config: Config, part: Part | None = None) -> Manifest | None:
    """Writes the clips of `source` as shards into the folder `out`; blocks that are complete are skipped.

    With several parts, the one that completes the last block writes the manifest and returns it; the others return
    None. Raises MegaSoraError.
    """
    from megasora.ingest.driver import run_ingest

    return run_ingest(Path(source), Path(out), config, part)
