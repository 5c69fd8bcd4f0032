"""Lists the clips of a source in the order that numbers them.

    a folder            every clip below it, by path (clip_folder.py)
    a list, .txt        one path per line (clip_list.py)
    a list, .jsonl      one object per line: file, caption, split, start, end, member
    tars                a .tar, a folder of them or a pattern: raw WebDataset (clip_tars.py)

The position of a clip in the listing is its permanent sample id, so every process of an ingest gets the same listing
from a source. Files that are no clips are counted.
"""

from __future__ import annotations

import fnmatch
import glob
import re
from pathlib import Path

from megasora.data.media_formats import CLIP_FILES
from megasora.errors import MegaSoraError
from megasora.ingest.clip_folder import clips_of_folder
from megasora.ingest.clip_list import clips_of_list
from megasora.ingest.clip_tars import clips_of_tars
from megasora.ingest.file_counts import HIDDEN, OTHER_SUFFIX, FileCounts
from megasora.ingest.file_roles import find_roles, suffix_of
from megasora.ingest.listing import ClipSource, Listing
from megasora.ingest.walk import walk

LIST_SUFFIXES = (".txt", ".jsonl")


def find_clips(source: Path) -> Listing:
    """Every clip of `source`, in the order of sample ids. Raises MegaSoraError, also where there is no clip."""
    counts = FileCounts()
    if source.is_dir():
        clips = clips_below(source, counts)
    elif source.is_file() and source.suffix.lower() == ".tar":
        clips = list(clips_of_tars([source], source.parent, counts))
    elif source.is_file() and source.suffix.lower() in LIST_SUFFIXES:
        clips = clips_of_list(source, counts)
    elif not source.exists() and re.search(r"[*?\[]", str(source)):
        tars = sorted(path for path in matching(source) if path.suffix.lower() == ".tar" and path.is_file())
        if not tars:
            raise MegaSoraError(f"no .tar file matches {source}")
        clips = list(clips_of_tars(tars, common_folder(tars), counts))
    else:
        problem = "is not a folder" if source.is_file() or not source.exists() else "is a FIFO, a socket or a device"
        raise MegaSoraError(f"{source} {problem}; give the folder that holds the clips, a list (.txt, .jsonl), or tars")
    if not clips:
        found = f"; it holds {counts.describe_kind(OTHER_SUFFIX)}" if counts.suffixes else ""
        raise MegaSoraError(f"no clip in {source}: looked for {CLIP_FILES} files, and .tar files of such{found}")
    return Listing(clips, counts)


def clips_below(source: Path, counts: FileCounts) -> list[ClipSource]:
    """The clips below a folder: those in its tars, if it has any, else its files."""
    names = walk(source, counts)
    tars = [name for name in names if suffix_of(name) == ".tar" and not name.rpartition("/")[2].startswith(".")]
    if not tars:
        return clips_of_folder(source, names, counts)
    others = sorted(set(names) - set(tars))
    if find_roles(others, FileCounts()).clips:
        raise MegaSoraError(f"{source} holds both tars and clips; ingest them apart, or give a list of the clips")
    for name in others:
        if name.rpartition("/")[2].startswith("."):
            counts.add(HIDDEN, name)
        else:
            counts.add_other(name, suffix_of(name))
    return list(clips_of_tars([source / name for name in tars], source, counts))


def matching(pattern: Path) -> list[Path]:
    """The paths that a pattern matches; `**` stands for any folders, linked ones included, each of them once."""
    if "**" not in pattern.parts:
        return [Path(name) for name in glob.glob(str(pattern))]
    start = pattern.parts.index("**")
    names = []
    for root in matching(Path(*pattern.parts[:start])) if start else [Path()]:
        if root.is_dir():
            parts = pattern.parts[start:]
            names += [root / name for name in walk(root, FileCounts()) if matches(tuple(name.split("/")), parts)]
    return names


def matches(parts: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Whether a path, by parts, matches a pattern. As in a shell, only a pattern with a leading dot matches one."""
    if not patterns or not parts:
        return not parts and all(pattern == "**" for pattern in patterns)
    hidden = parts[0].startswith(".") and not patterns[0].startswith(".")
    if patterns[0] == "**":
        return matches(parts, patterns[1:]) or (not hidden and matches(parts[1:], patterns))
    return not hidden and fnmatch.fnmatchcase(parts[0], patterns[0]) and matches(parts[1:], patterns[1:])


def common_folder(paths: list[Path]) -> Path:
    folder = paths[0].parent
    while not all(path.is_relative_to(folder) for path in paths):
        folder = folder.parent
    return folder
