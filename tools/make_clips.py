"""Write a folder of procedural captioned clips: a data set on which every step of pretraining runs, anywhere.

In: numbers and names on the command line. Out: OUT/train and OUT/val, each with clip-000000.mp4 (H.264) or,
of one frame, clip-000000.png, and the caption beside it in clip-000000.txt. What the clips show, and why, is
told in `megasora/testing/clips.py`.
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from megasora.errors import MegaSoraError
from megasora.testing import clips

EXAMPLE = """\
writes
  OUT/train/clip-NNNNNN.mp4   H.264, 5 to 33 frames at 8 to 24 frames per second, 24 to 48 px a side
  OUT/train/clip-NNNNNN.png   about one clip in eight: an image, which is a clip of one frame
  OUT/train/clip-NNNNNN.txt   its caption, one line
  OUT/val/...                 the same, never seen in training; every fourth clip shows a held-out combination
                              of color, shape and direction
About 3 KB and 3 ms of one core a clip. The same arguments write the same clips.

example
  python tools/make_clips.py --out data/clips --clips 3000 --val-clips 96 --colors red,blue --bounce 0.1
"""


def names(text: str) -> tuple[str, ...]:
    """Split a comma-separated argument."""
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
        described = f"comma-separated, out of {','.join(known)} (default {','.join(default)})"
        parser.add_argument(f"--{option}", type=names, default=default, metavar="A,B", help=described)
    parser.add_argument("--bounce", type=float, default=0.0, help="share that bounces, 0 to 1 (default 0)")
    parser.add_argument("--processes", type=int, default=2, help="worker processes, at most (default 2)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Write the clips and print what was written; returns the exit code, 0, or 2 for a refusal."""
    options = parse_arguments(arguments)
    try:
        summaries = clips.write_dataset(
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
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table(title=f"clips in {options.out}")
    table.add_column("split")
    for heading in ("clips", "of these images", "frames", "video, s", "on disk, KB"):
        table.add_column(heading, justify="right")
    for row in summaries:
        numbers = (row.clips, row.images, row.frames, f"{row.seconds:.1f}", f"{row.bytes / 1000:.0f}")
        table.add_row(row.split, *map(str, numbers))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
