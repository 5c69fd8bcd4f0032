"""The clips of a list: a .txt with one path per line, or a .jsonl with one object per line.

    {"file": ..., "caption": ..., "split": ..., "start": seconds, "end": seconds}; file is required, and where it is a
    tar, "member": the name of a clip in it

Clips are sorted by path, position in a tar and start.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from megasora.data.media import Media
from megasora.data.media_formats import CLIP_FILES
from megasora.data.shard_format import SPLITS
from megasora.errors import MegaSoraError
from megasora.ingest.captions import find_caption, one_line, parse_json_lines, read_caption_file, read_lines, unreadable
from megasora.ingest.clip_tars import clips_of_tars
from megasora.ingest.file_counts import CLIP, FileCounts
from megasora.ingest.file_roles import TEXT_SUFFIXES, NamedFile, is_clip_name, reading_order, suffix_of
from megasora.ingest.listing import ClipSource, split_of

MAX_SECONDS = 1e9  # 30 years; a start or an end beyond it is no time in a file


def clips_of_list(table: Path, counts: FileCounts) -> list[ClipSource]:
    """Raises MegaSoraError for a line that cannot be used, and for a clip that is listed twice."""
    lines = read_lines(table)
    named = parse_json_lines(str(table), lines) if table.suffix.lower() == ".jsonl" else parse_name_lines(lines)
    tars, texts = TarListings(), FolderTexts()
    clips = [clip_of_line(table, number, name, values, tars, texts) for number, name, values in named]
    clips.sort(key=lambda c: (c.media.path, c.media.offset, c.media.start, c.media.end or math.inf))
    for previous, clip in zip(clips, clips[1:], strict=False):
        if previous.media == clip.media:
            raise MegaSoraError(f"{table} lists {clip.media} twice")
    counts.kinds[CLIP] += len(clips)
    return clips


def parse_name_lines(lines: list[str]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Line number, file name and no values, for each line of a .txt list that is not empty."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, line, {}


class TarListings:
    """The clips of tars by member name; each tar is read once."""

    def __init__(self) -> None:
        self.clips: dict[Path, dict[str, ClipSource]] = {}

    def find(self, tar: Path, member: str) -> ClipSource | None:
        if tar not in self.clips:
            self.clips[tar] = {clip.media.name: clip for clip in clips_of_tars([tar], tar.parent, FileCounts())}
        return self.clips[tar].get(member)


class FolderTexts:
    """The files beside clips that may hold their captions; each folder is read once."""

    def __init__(self) -> None:
        self.texts_of = lru_cache(1000)(texts_by_stem)

    def beside(self, clip: Path) -> list[str]:
        """NAME.txt, then NAME.json."""
        return self.texts_of(clip.parent).get(clip.stem, [])


def texts_by_stem(folder: Path) -> dict[str, list[str]]:
    """stem -> the regular files STEM.txt and STEM.json of a folder, whatever the case of their suffixes."""
    texts: dict[str, list[str]] = {}
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if suffix_of(entry.name) in TEXT_SUFFIXES and entry.is_file())
    files = [NamedFile(name, os.path.splitext(name)[0], suffix_of(name)) for name in names]
    for file in sorted(files, key=reading_order):
        texts.setdefault(file.stem, []).append(file.name)
    return texts


def clip_of_line(
    table: Path, number: int, name: str, values: dict[str, Any], tars: TarListings, texts: FolderTexts
) -> ClipSource:
    """The clip of one line: the file or member, with the split, the times and the caption that the line gives."""
    line = f"{table}:{number}"
    clip = locate_clip(line, table.parent / name, name, values.get("member"), tars)
    split = values.get("split") or ("val" if split_of(name) == "val" else clip.split)
    if split not in SPLITS:
        raise MegaSoraError(f"{line}: split {split!r} is not one of {', '.join(SPLITS)}")
    start, end = read_times(line, values)
    path = clip.media.path
    if "caption" in values:
        clip = replace(clip, caption=None, caption_rejection=None)
        try:
            clip = replace(clip, caption=None if values["caption"] is None else one_line(values["caption"]))
        except UnicodeError as error:
            clip = replace(clip, caption_rejection=unreadable(str(clip.media), f"{line}: {error}", error))
        except ValueError as error:
            raise MegaSoraError(f"{line}: the caption: {error}") from None
    elif values.get("member") is None:
        caption, rejection = find_caption(
            str(path), texts.beside(path), lambda text: read_caption_file(path.parent / text)
        )
        clip = replace(clip, caption=caption, caption_rejection=rejection)
    return replace(clip, media=replace(clip.media, start=start, end=end), split=split)


def locate_clip(line: str, path: Path, name: str, member: object, tars: TarListings) -> ClipSource:
    """The whole file, or the whole member of a tar, that a line names. `line`: TABLE:NUMBER, for messages."""
    if member is None and path.suffix.lower() == ".tar":
        raise MegaSoraError(f'{line}: {name} is a tar; name a clip in it, in a .jsonl: "member": "NAME.mp4"')
    if member is None and not is_clip_name(path.name):
        raise MegaSoraError(f"{line}: {name} is not a clip; clips are {CLIP_FILES} files")
    if not path.is_file():
        problem = "is not a regular file" if path.exists() else "does not exist"
        raise MegaSoraError(f"{line}: {path} {problem}; names are relative to the folder of the list")
    if member is None:
        return ClipSource(Media(path), name, path.stat().st_size, split_of(name), None)
    clip = tars.find(path, member) if isinstance(member, str) else None
    if clip is None:
        raise MegaSoraError(f"{line}: {path} contains no clip named {member!r}")
    return replace(clip, name=f"{name}/{member}")


def read_times(line: str, values: dict[str, Any]) -> tuple[float, float | None]:
    """Seconds at which the clip of a line starts and ends in its file; an end of None is that of the file."""
    start, end = values.get("start") or 0.0, values.get("end")
    for second in (start, *([] if end is None else [end])):
        if isinstance(second, bool) or not isinstance(second, (int, float)) or not 0 <= second < MAX_SECONDS:
            raise MegaSoraError(f"{line}: start and end are seconds, not {repr(second)[:40]}")
    if end is not None and end <= start:
        raise MegaSoraError(f"{line}: end={end} is not after start={start}")
    return float(start), None if end is None else float(end)
