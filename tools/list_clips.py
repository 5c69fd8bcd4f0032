"""Looks through clips and writes a list for `megasora ingest`: videos cut into scenes, near-duplicates left out.

    python tools/list_clips.py CLIPS --out list.jsonl --scenes --unique
    megasora ingest list.jsonl --out data/shards

A pass of its own, since both change which clips there are, and so their numbers. The same clips give the same list.
What cannot be decoded is listed as it is: ingest counts it with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megasora.config import load
from megasora.errors import MegaSoraError
from megasora.ingest.duplicates import Seen
from megasora.ingest.pool import Pool
from megasora.ingest.sources import Source, find_clips
from megasora.ingest.worker import look_of, settings_of

NEVER = 256.0  # a change that no two frames have


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, metavar="CLIPS", help="a folder of clips, a list of them, or tars")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".jsonl to write")
    parser.add_argument("--scenes", action="store_true", help="a line a scene")
    parser.add_argument("--threshold", type=float, default=20.0, help="change at a cut, levels of 255")
    parser.add_argument("--min-seconds", type=float, default=1.0, help="shortest scene")
    parser.add_argument("--unique", action="store_true", help="leave out what looks like a clip before")
    parser.add_argument("--bits", type=int, default=4, choices=range(17), metavar="0-16", help="how unlike it may be")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. ingest.workers=4")
    options = parser.parse_intermixed_args(arguments)
    try:
        lines, dropped = list_clips(options)
    except (MegaSoraError, OSError) as error:
        print(f"list_clips: error: {error}", file=sys.stderr)
        return 2
    print(f"{lines} clips in {options.out}" + (f"; {dropped} near-duplicates left out" if options.unique else ""))
    return 0


def list_clips(options: argparse.Namespace) -> tuple[int, int]:
    """Lines written, and clips left out."""
    config = load(None, options.overrides)
    clips = find_clips(options.clips)
    threshold = options.threshold if options.scenes else NEVER
    waiting: deque[Source] = deque()

    def jobs() -> Iterator[dict]:
        for clip in clips:
            waiting.append(clip)
            yield look_of(clip.media, threshold, options.min_seconds)

    seen, lines, dropped = Seen(options.bits), [], 0
    settings = settings_of(config.codec, config.ingest, config.data.patch)
    with Pool(settings, config.ingest.workers or len(os.sched_getaffinity(0))) as pool:
        for answer in pool.run(jobs()):
            clip = waiting.popleft()
            whole = [[clip.media.start, clip.media.end, None, None]]
            for start, end, first, middle in answer.get("scenes", whole):
                if options.unique and first is not None and seen.like((first, middle)) is not None:
                    dropped += 1
                    continue
                part = replace(clip, media=replace(clip.media, start=start, end=end))
                lines.append(line_of(part, options.out.absolute().parent))
    part = options.out.with_name(f".{options.out.name}.part")
    part.write_text("".join(lines), encoding="utf-8")
    os.replace(part, options.out)
    return len(lines), dropped


def line_of(clip: Source, folder: Path) -> str:
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
