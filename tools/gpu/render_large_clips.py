"""render_large_clips.py FOLDER COUNT HEIGHT WIDTH FRAMES: rendered clips of one large size, and one held-out clip."""

from __future__ import annotations

import sys
from multiprocessing import Pool
from pathlib import Path

from megasora.testing.clip_files import write_clip
from megasora.testing.clips import clip_at


def render(folder: str, split: str, index: int, height: int, width: int, frames: int) -> None:
    spec, text = clip_at(0, split, index, native_sizes={(height, width): 1.0}, lengths={frames: 1.0})
    write_clip(spec, text, Path(folder) / split / f"clip-{index:06d}")


if __name__ == "__main__":
    folder, count, *size = sys.argv[1], *map(int, sys.argv[2:])
    jobs = [(folder, "train", index, *size) for index in range(count)] + [(folder, "val", 0, *size)]
    with Pool(min(8, len(jobs))) as pool:
        pool.starmap(render, jobs, chunksize=1)
    print(len(jobs), "clips of", "x".join(map(str, size)))
