"""Writes a folder of procedural captioned clips: a small data set for every step of pretraining, on any machine.

OUT/train and OUT/val each hold clip-000000.mp4 (H.264) or, for one frame, clip-000000.png, and its caption in
clip-000000.txt. `megasora/testing/clips.py` describes what the clips show, and why.
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from megasora.errors import MegaSoraError, describe
from megasora.testing import clip_files, clips

EXAMPLE = """\
writes
  OUT/train/clip-NNNNNN.mp4   H.264, 5 to 33 frames at 8 to 24 frames per second, 24 to 48 px a side
  OUT/train/clip-NNNNNN.png   about one clip in eight: an image, which is a clip of one frame
  OUT/train/clip-NNNNNN.txt   its caption, one line
  OUT/val/...                 the same for validation; every fourth clip shows a combination of color, shape and
                              direction that training clips never show
About 3 KB and 3 ms of one core per clip. The same arguments write the same clips.

example
  python tools/make_clips.py --out data/clips --clips 3000 --val-clips 96 --colors red,blue --bounce 0.1
"""


def names(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated argument."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make_clips.py",
        description="Write procedural captioned clips (mp4, png, txt) for training and validation.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="folder to write; must be absent or empty")
    parser.add_argument("--clips", type=int, default=3000, help="training clips (default 3000)")
    parser.add_argument("--val-clips", type=int, default=96, help="validation clips (default 96)")
    parser.add_argument("--seed", type=int, default=0, help="clip i depends on seed and i only (default 0)")
    for option, default, known in (
        ("colors", clips.DEFAULT_COLORS, clips.COLORS),
        ("shapes", clips.DEFAULT_SHAPES, clips.SHAPES),
        ("backgrounds", clips.DEFAULT_BACKGROUNDS, clips.BACKGROUNDS),
    ):
        help_text = f"comma-separated, out of {','.join(known)} (default {','.join(default)})"
        parser.add_argument(f"--{option}", type=names, default=default, metavar="A,B", help=help_text)
    parser.add_argument("--bounce", type=float, default=0.0, help="fraction of clips that bounce, 0 to 1 (default 0)")
    parser.add_argument("--processes", type=int, default=2, help="largest number of worker processes (default 2)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Writes the clips and prints a summary; returns the exit code: 0, or 2 for wrong arguments."""
    options = parse_arguments(arguments)
    try:
        summaries = clip_files.write_dataset(
            options.out,
            options.clips,
            options.val_clips,
            options.seed,
            colors=options.colors,
            shapes=options.shapes,
            backgrounds=options.backgrounds,
            bounce_fraction=options.bounce,
            processes=options.processes,
        )
    except MegaSoraError as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 2
    table = Table(title=f"clips in {options.out}")
    table.add_column("split")
    for heading in ("clips", "of these images", "frames", "video, s", "on disk, KB"):
        table.add_column(heading, justify="right")
    for row in summaries:
        cells = (row.clips, row.images, row.frames, f"{row.seconds:.1f}", f"{row.bytes / 1000:.0f}")
        table.add_row(row.split, *map(str, cells))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
