"""Writes a list of clips for `megasora ingest`: splits videos into scenes and leaves out near-duplicates.

    python tools/list_clips.py CLIPS --out list.jsonl --scenes --unique
    megasora ingest list.jsonl --out data/shards

This is a separate pass because both options change which clips there are, and so their sample ids. The same clips give
the same list. A clip that cannot be decoded is listed unchanged: ingest rejects it with a reason.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megasora.config import load
from megasora.errors import MegaSoraError, describe, printable
from megasora.files import write_text_atomic
from megasora.ingest.duplicates import DuplicateIndex
from megasora.ingest.listing import ClipSource, Listing
from megasora.ingest.pool import WorkerPool
from megasora.ingest.results import FoundScenes
from megasora.ingest.sources import find_clips
from megasora.ingest.worker import scene_job, worker_settings

NO_CUTS = 256.0  # a threshold above every change of two frames


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, metavar="CLIPS", help="a folder of clips, a list of them, or tars")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".jsonl file to write")
    parser.add_argument("--scenes", action="store_true", help="one line per scene instead of one per clip")
    parser.add_argument("--threshold", type=float, default=20.0, help="smallest change at a cut, levels of 255")
    parser.add_argument("--min-seconds", type=float, default=1.0, help="shortest scene")
    parser.add_argument("--unique", action="store_true", help="leave out near-duplicates of an earlier clip")
    parser.add_argument("--bits", type=int, default=4, choices=range(17), metavar="0-16", help="of 64 that may differ")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. ingest.workers=4")
    options = parser.parse_intermixed_args(arguments)
    try:
        listing = find_clips(options.clips)
        num_clips, num_duplicates = list_clips(options, listing)
    except (MegaSoraError, OSError) as error:
        print(f"list_clips: error: {describe(error)}", file=sys.stderr)
        return 2
    for line in listing.files.describe():
        print(printable(line))
    left_out = f"; {num_duplicates} near-duplicates left out" if options.unique else ""
    print(f"{num_clips} clips in {printable(str(options.out))}{left_out}")
    return 0


def list_clips(options: argparse.Namespace, listing: Listing) -> tuple[int, int]:
    """Writes the list; returns the numbers of clips listed and of near-duplicates left out."""
    folder = options.out.absolute().parent
    index, lines, num_duplicates = DuplicateIndex(options.bits), [], 0
    for clip, first_hash, middle_hash in find_scenes(options, listing):
        if options.unique and first_hash is not None and index.find_or_add((first_hash, middle_hash)) is not None:
            num_duplicates += 1
        else:
            lines.append(line_of(clip, folder))
    write_text_atomic(options.out, "".join(lines))
    return len(lines), num_duplicates


def find_scenes(options: argparse.Namespace, listing: Listing) -> Iterator[tuple[ClipSource, int | None, int | None]]:
    """Each scene as a clip, with the hashes of its first and middle frame or None; without --scenes, whole clips."""
    config = load(None, options.overrides)
    threshold = options.threshold if options.scenes else NO_CUTS

    def jobs() -> Iterator[tuple[ClipSource, dict]]:
        for clip in listing.clips:
            yield clip, scene_job(clip.media, threshold, options.min_seconds)

    settings = worker_settings(config.codec, config.ingest, config.data.patch)
    with WorkerPool(settings, config.ingest.workers or len(os.sched_getaffinity(0))) as pool:
        for clip, result, _ in pool.run(jobs()):
            whole_clip = [[clip.media.start, clip.media.end, None, None]]
            scenes = result.scenes if isinstance(result, FoundScenes) else whole_clip
            for start, end, first_hash, middle_hash in scenes:
                yield replace(clip, media=replace(clip.media, start=start, end=end)), first_hash, middle_hash


def line_of(clip: ClipSource, folder: Path) -> str:
    """One line of the list; the file is relative to `folder` where it is below it."""
    media, path = clip.media, clip.media.path.absolute()
    name = path.relative_to(folder) if path.is_relative_to(folder) else path
    values: dict[str, object] = {"file": name.as_posix(), "split": clip.split}
    if media.name:
        values["member"] = media.name
    if clip.caption is not None:
        values["caption"] = clip.caption
    if media.start:
        values["start"] = media.start
    if media.end is not None:
        values["end"] = media.end
    return json.dumps(values) + "\n"


if __name__ == "__main__":
    sys.exit(main())
