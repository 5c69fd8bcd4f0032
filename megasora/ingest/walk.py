"""Finds the files of a folder of clips, also through links, each folder once.

Folders are walked without their links first, so a folder keeps its own name; then linked folders follow in the order of
their names, unless they were seen before: a link to a folder above it makes no loop.
"""

from __future__ import annotations

import heapq
import os
import stat
from pathlib import Path

from megasora.ingest.file_counts import BROKEN_LINK, NOT_REGULAR, SEEN_FOLDER, UNREADABLE_FOLDER, FileCounts


def walk(source: Path, counts: FileCounts) -> list[str]:
    """The regular files below a folder, by path: names relative to it, with / between folders.

    Counts in `counts` what is no regular file and no folder, and the folders that are not walked. Raises OSError if
    `source` itself cannot be read.
    """
    names: list[str] = []
    seen: set[tuple[int, int]] = set()  # device and inode of folders
    starts: list[list[str]] = [[]]  # a heap of folders, by their parts: the source, then linked folders
    while starts:
        folders = [heapq.heappop(starts)]
        while folders:
            parts = folders.pop()
            if not is_new(source.joinpath(*parts), "/".join(parts), seen, counts):
                continue
            subfolders, links = scan(source.joinpath(*parts), parts, names, counts)
            folders += subfolders
            for link in links:
                heapq.heappush(starts, link)
    return sorted(names, key=lambda name: name.split("/"))


def is_new(folder: Path, name: str, seen: set[tuple[int, int]], counts: FileCounts) -> bool:
    """Adds a folder to `seen`; False, and counted, if it is there already or cannot be read."""
    try:
        info = folder.stat()
        os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
    except OSError:
        if not seen:
            raise
        counts.add(UNREADABLE_FOLDER, name)
        return False
    identity = info.st_dev, info.st_ino
    if identity in seen:
        counts.add(SEEN_FOLDER, name)
        return False
    seen.add(identity)
    return True


def scan(
    folder: Path, parts: list[str], names: list[str], counts: FileCounts
) -> tuple[list[list[str]], list[list[str]]]:
    """The folders in a folder, and its links to folders, as parts of paths. Appends its files to `names`."""
    subfolders, links = [], []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = [*parts, entry.name]
            try:
                mode = entry_mode(entry)
            except OSError:
                counts.add(BROKEN_LINK, "/".join(path))
                continue
            if stat.S_ISDIR(mode):
                (links if entry.is_symlink() else subfolders).append(path)
            elif stat.S_ISREG(mode):
                names.append("/".join(path))
            else:
                counts.add(NOT_REGULAR, "/".join(path))
    return subfolders, links


def entry_mode(entry: os.DirEntry[str]) -> int:
    """The file type of an entry, or of what it is a link to. Raises OSError for a broken link."""
    if entry.is_file(follow_symlinks=False):  # known from the folder, without a call for each file
        return stat.S_IFREG
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    return entry.stat().st_mode
