"""Decides by their names which files of a folder or a tar are clips, and which belong to a clip.

A picture beside a video of the same name is its thumbnail, as downloaders write it: a.mp4 with a.jpg, or a.mp4.jpg.
A caption of a.mp4 is a.txt or a.json. In a tar, the files of one WebDataset key (the name up to its first dot) belong
together too, if one of them is the only video or the only clip: 7.mp4, 7.thumb.jpg, 7.caption.txt.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from megasora.data.media_formats import IMAGE_FORMATS, VIDEO_FORMATS
from megasora.data.tar import split_name
from megasora.ingest.file_counts import CAPTION, CLIP, HIDDEN, NO_CLIP_TEXT, THUMBNAIL, FileCounts

CAPTION_TABLE = "captions.jsonl"
TEXT_SUFFIXES = (".txt", ".json")  # in the order in which a caption is looked for


@dataclass(frozen=True)
class FileRoles:
    """The clips of a folder or a tar, in the order of its files, with what belongs to them."""

    clips: list[str]
    texts: dict[str, list[str]]  # clip -> files that may hold its caption, in the order in which they are read
    tables: list[str]  # files named captions.jsonl


class NamedFile(NamedTuple):
    """A file name, with its folder, and its parts."""

    name: str
    stem: str  # without the suffix
    suffix: str  # in lower case, with its dot; empty if there is none


def suffix_of(name: str) -> str:
    """The suffix of a file name, in lower case and with its dot; empty if it has none."""
    return os.path.splitext(name)[1].lower()


def is_clip_name(name: str) -> bool:
    """Whether the suffix is that of a video or an image that can be read."""
    return suffix_of(name) in VIDEO_FORMATS or suffix_of(name) in IMAGE_FORMATS


def find_roles(names: Iterable[str], counts: FileCounts, by_key: bool = False) -> FileRoles:
    """Sorts files by their names, which have / between folders, and counts each one. `by_key`: as in a tar."""
    media: list[NamedFile] = []
    texts: list[NamedFile] = []
    tables = []
    for name in names:
        base = name.rpartition("/")[2]
        stem, suffix = os.path.splitext(name)
        suffix = suffix.lower()
        if base.startswith("."):
            counts.add(HIDDEN, name)
        elif base == CAPTION_TABLE:
            tables.append(name)
            counts.add(CAPTION, name)
        elif suffix in VIDEO_FORMATS or suffix in IMAGE_FORMATS:
            media.append(NamedFile(name, stem, suffix))
        elif suffix in TEXT_SUFFIXES:
            texts.append(NamedFile(name, stem, suffix))
        else:
            counts.add_other(name, suffix)
    thumbnails = find_thumbnails(media, by_key)
    clips = [file for file in media if file.name not in thumbnails]
    assigned = assign_texts(clips, texts, by_key)
    used = {text for texts_of_clip in assigned.values() for text in texts_of_clip}
    for file in media:
        counts.add(THUMBNAIL if file.name in thumbnails else CLIP, file.name)
    for file in texts:
        counts.add(CAPTION if file.name in used else NO_CLIP_TEXT, file.name)
    return FileRoles([file.name for file in clips], assigned, tables)


def find_thumbnails(media: list[NamedFile], by_key: bool) -> set[str]:
    """The pictures that belong to a video."""
    videos = [file for file in media if file.suffix in VIDEO_FORMATS]
    images = [file for file in media if file.suffix in IMAGE_FORMATS]
    owners = {video.stem for video in videos} | {video.name for video in videos}
    thumbnails = {image.name for image in images if image.stem in owners}
    if by_key:
        videos_of_key = group_by_key(videos)
        thumbnails |= {image.name for image in images if len(videos_of_key[key_of(image.name)]) == 1}
    return thumbnails


def assign_texts(clips: list[NamedFile], texts: list[NamedFile], by_key: bool) -> dict[str, list[str]]:
    """clip -> the files that may hold its caption, in the order in which they are read."""
    texts_of_stem: dict[str, list[str]] = defaultdict(list)
    for text in sorted(texts, key=reading_order):
        texts_of_stem[text.stem].append(text.name)
    assigned = {clip.name: list(texts_of_stem.get(clip.stem, ())) for clip in clips}
    if by_key:
        texts_of_key = group_by_key(texts)
        for key, clips_of_key in group_by_key(clips).items():
            if len(clips_of_key) == 1:
                own = assigned[clips_of_key[0].name]
                own += [text.name for text in sorted(texts_of_key[key], key=reading_order) if text.name not in own]
    return assigned


def reading_order(text: NamedFile) -> tuple[int, bool]:
    """.txt before .json, and .txt before .TXT."""
    return TEXT_SUFFIXES.index(text.suffix), not text.name.endswith(text.suffix)


def key_of(name: str) -> str:
    """The WebDataset key of a file in a tar."""
    pair = split_name(name)
    return pair[0] if pair else name


def group_by_key(files: Iterable[NamedFile]) -> dict[str, list[NamedFile]]:
    groups: dict[str, list[NamedFile]] = defaultdict(list)
    for file in files:
        groups[key_of(file.name)].append(file)
    return groups
