"""Lists the clips of a source in the order that numbers them.

    a folder            every clip below it, by path
    a list, .txt        one path per line
    a list, .jsonl      {"file": ..., "caption": ..., "split": ..., "start": seconds, "end": seconds}; file is required,
                        and where it is a tar, "member": the name of a clip in it
    tars                a .tar, a folder of them or a pattern: raw WebDataset, a clip and its caption under one key

The clips of a list are sorted by path, position in a tar and start, those of tars by tar and position in it. The
position of a clip in the listing is its permanent sample id, so every process of an ingest gets the same listing from a
source.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from megasora.data.media_formats import CLIP_FILES, IMAGE_FORMATS, VIDEO_FORMATS
from megasora.data.shard_format import SPLITS
from megasora.data.tar import read_members, split_name
from megasora.data.video import Media, is_clip
from megasora.errors import MegaSoraError

MAX_CAPTION_BYTES = 1 << 24  # size of a file that a caption is read from
CLIP_SUFFIXES = [suffix[1:] for suffix in (*VIDEO_FORMATS, *IMAGE_FORMATS)]


@dataclass(frozen=True)
class ClipSource:
    """One clip of a listing: where its bytes are, its split and its caption."""

    media: Media
    name: str  # for people: the path below the source, or TAR/MEMBER
    size: int  # bytes
    split: str
    caption: str | None
    caption_error: str = ""  # why the caption of a clip in a tar cannot be read


def find_clips(source: Path) -> list[ClipSource]:
    """Every clip of `source`, in the order of sample ids. Raises MegaSoraError, also where there is no clip."""
    if source.is_dir():
        tars = sorted(p for p in source.rglob("*.tar") if p.is_file() and not p.name.startswith("."))
        clips = list(clips_of_tars(tars, source)) if tars else clips_of_folder(source)
        if tars and any(is_clip(p) for p in source.rglob("*") if not p.name.startswith(".")):
            raise MegaSoraError(f"{source} holds both tars and clips; ingest them apart, or give a list of the clips")
    elif source.suffix.lower() == ".tar" and source.is_file():
        clips = list(clips_of_tars([source], source.parent))
    elif source.suffix.lower() in (".txt", ".jsonl") and source.is_file():
        clips = clips_of_list(source)
    elif re.search(r"[*?\[]", str(source)):
        tars = sorted(Path(name) for name in glob.glob(str(source), recursive=True) if name.endswith(".tar"))
        if not tars:
            raise MegaSoraError(f"no .tar file matches {source}")
        clips = list(clips_of_tars(tars, common_folder(tars)))
    else:
        raise MegaSoraError(
            f"{source} is not a folder; give the folder that holds the clips, a list (.txt, .jsonl), or tars"
        )
    if not clips:
        raise MegaSoraError(f"no clip in {source}: looked for {CLIP_FILES} files, and .tar files of such")
    return clips


def listing_hash(clips: Iterable[ClipSource]) -> str:
    """SHA-256 of names, sizes, times, splits and captions. Another hash means that sample ids may differ."""
    digest = hashlib.sha256()
    for clip in clips:
        media = clip.media
        values = [clip.name, clip.size, media.start, media.end, clip.split, clip.caption, clip.caption_error]
        digest.update(json.dumps(values).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- a folder


def clips_of_folder(source: Path) -> list[ClipSource]:
    captions = CaptionFiles(source)
    paths = sorted(p for p in source.rglob("*") if is_clip(p) and p.is_file() and not p.name.startswith("."))
    clips = []
    for path in paths:
        name, size = path.relative_to(source), path.stat().st_size
        clips.append(ClipSource(Media(path), name.as_posix(), size, split_of(name), captions.find(path, source)))
    return clips


def split_of(name: Path) -> str:
    """The split of a path relative to the source: what is in its folder `val` is for validation."""
    return "val" if name.parts[0] == "val" else "train"


class CaptionFiles:
    """Finds the caption of a file: NAME.txt, else the key `caption` of NAME.json, else a line
    {"file": ..., "caption": ...} of the nearest captions.jsonl in its folder or above, up to `source`."""

    def __init__(self, source: Path):
        self.tables = {table.parent: read_caption_table(table) for table in sorted(source.rglob("captions.jsonl"))}

    def find(self, path: Path, source: Path) -> str | None:
        caption = caption_beside(path)
        if caption is not None:
            return caption
        for folder in (path.parent, *path.parents):
            caption = self.tables.get(folder, {}).get(path.relative_to(folder).as_posix())
            if caption is not None or folder == source:
                return caption
        return None


def read_caption_table(table: Path) -> dict[str, str]:
    return {name: one_line(values["caption"]) for _, name, values in read_json_lines(table, ("caption",))}


def caption_beside(path: Path) -> str | None:
    """The caption in NAME.txt or NAME.json in the folder of a clip; None where neither exists."""
    text, meta = path.with_suffix(".txt"), path.with_suffix(".json")
    if text.is_file():
        return one_line(read_text(text))
    if meta.is_file():
        try:
            return one_line(json.loads(read_text(meta))["caption"])
        except (ValueError, KeyError, TypeError):
            raise MegaSoraError(f'{meta} is not JSON with a text under the key "caption"') from None
    return None


# ---------------------------------------------------------------- a list


def clips_of_list(table: Path) -> list[ClipSource]:
    lines = read_json_lines(table, ()) if table.suffix.lower() == ".jsonl" else read_name_lines(table)
    tars = TarListings()
    clips = [clip_of_line(table, number, name, values, tars) for number, name, values in lines]
    clips.sort(key=lambda c: (c.media.path, c.media.offset, c.media.start, c.media.end or math.inf))
    for previous, clip in zip(clips, clips[1:], strict=False):
        if previous.media == clip.media:
            raise MegaSoraError(f"{table} lists {clip.media} twice")
    return clips


class TarListings:
    """The clips of tars by member name; each tar is read once."""

    def __init__(self) -> None:
        self.clips: dict[Path, dict[str, ClipSource]] = {}

    def find(self, tar: Path, member: str) -> ClipSource | None:
        if tar not in self.clips:
            self.clips[tar] = {clip.media.name: clip for clip in clips_of_tars([tar], tar.parent)}
        return self.clips[tar].get(member)


def clip_of_line(table: Path, number: int, name: str, values: dict[str, Any], tars: TarListings) -> ClipSource:
    """The clip of one line: the file or member, with the split, the times and the caption that the line gives."""
    line = f"{table}:{number}"
    clip = locate_clip(line, table.parent / name, name, values.get("member"), tars)
    split = values.get("split") or ("val" if split_of(Path(name)) == "val" else clip.split)
    if split not in SPLITS:
        raise MegaSoraError(f"{line}: split {split!r} is not one of {', '.join(SPLITS)}")
    start, end = read_times(line, values)
    if "caption" in values:
        try:
            caption = None if values["caption"] is None else one_line(values["caption"])
        except ValueError as error:
            raise MegaSoraError(f"{line}: the caption: {error}") from None
        clip = replace(clip, caption=caption, caption_error="")
    elif values.get("member") is None:
        clip = replace(clip, caption=caption_beside(clip.media.path))
    return replace(clip, media=replace(clip.media, start=start, end=end), split=split)


def locate_clip(line: str, path: Path, name: str, member: object, tars: TarListings) -> ClipSource:
    """The whole file, or the whole member of a tar, that a line names. `line`: TABLE:NUMBER, for messages."""
    if member is None and path.suffix.lower() == ".tar":
        raise MegaSoraError(f'{line}: {name} is a tar; name a clip in it, in a .jsonl: "member": "NAME.mp4"')
    if member is None and not is_clip(path):
        raise MegaSoraError(f"{line}: {name} is not a clip; clips are {CLIP_FILES} files")
    if not path.is_file():
        raise MegaSoraError(f"{line}: {path} does not exist; names are relative to the folder of the list")
    if member is None:
        return ClipSource(Media(path), name, path.stat().st_size, split_of(Path(name)), None)
    clip = tars.find(path, member) if isinstance(member, str) else None
    if clip is None:
        raise MegaSoraError(f"{line}: {path} contains no clip named {member!r}")
    return replace(clip, name=f"{name}/{member}")


def read_times(line: str, values: dict[str, Any]) -> tuple[float, float | None]:
    """Seconds at which the clip of a line starts and ends in its file; an end of None is that of the file."""
    start, end = values.get("start") or 0.0, values.get("end")
    for second in (start, *([] if end is None else [end])):
        if isinstance(second, bool) or not isinstance(second, (int, float)) or not 0 <= second < math.inf:
            raise MegaSoraError(f"{line}: start and end are seconds, not {second!r}")
    if end is not None and end <= start:
        raise MegaSoraError(f"{line}: end={end} is not after start={start}")
    return float(start), None if end is None else float(end)


def read_name_lines(table: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Line number, file name and no values, for each line of a .txt list that is not empty."""
    for number, line in enumerate(read_text(table).split("\n"), 1):
        if line.strip():
            yield number, line.rstrip("\r"), {}


def read_json_lines(table: Path, required: tuple[str, ...]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Line number, file name and values of each line that is not empty; `required`: keys that must be text."""
    for number, line in enumerate(read_text(table, limit=None).split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            name = values["file"]
            if not isinstance(name, str) or not name or "\0" in name:
                raise ValueError(f"{name!r} is not a file name")
            for key in required:
                one_line(values[key])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise MegaSoraError(f'{table}:{number} is not {{"file": "NAME.mp4", "caption": "..."}}') from None
        yield number, name, values


# ---------------------------------------------------------------- tars


class ClipExtensions(Collection):
    """The extensions of members to read from a raw tar: those that end as a clip or a caption does; `b.mp4` too."""

    known = (*CLIP_SUFFIXES, "txt", "json")

    def __contains__(self, extension: object) -> bool:
        return isinstance(extension, str) and extension.rpartition(".")[2] in self.known

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)


def clips_of_tars(tars: list[Path], base: Path) -> Iterator[ClipSource]:
    """Members of one key are adjacent. Of a video and an image with one key, the image is a thumbnail of the video."""
    for tar in tars:
        tar_name = tar.relative_to(base) if tar.is_relative_to(base) else Path(tar.name)
        split = "val" if split_of(tar_name) == "val" or re.match(r"val\b", tar.name) else "train"
        with open(tar, "rb") as file:
            for key, members in group_by_key(read_members(file, ClipExtensions(), str(tar), others="skip")):
                clip = clip_member(tar, key, members)
                if clip is None:
                    continue
                caption, caption_error = None, ""
                try:
                    caption = caption_in_tar(file, members)
                except (ValueError, TypeError, AttributeError, RecursionError) as error:
                    caption_error = f"the caption of {clip.name} in {tar} cannot be read: {error!r}"
                media = Media(tar, clip.name, clip.offset, clip.size)
                yield ClipSource(media, f"{tar_name.as_posix()}/{clip.name}", clip.size, split, caption, caption_error)


def clip_member(tar: Path, key: str, members: list) -> Any | None:
    """The one video of a key, else the one image; None where it has neither. Raises MegaSoraError for several."""
    for formats in (VIDEO_FORMATS, IMAGE_FORMATS):
        clips = [m for m in members if "." + m.name.rpartition(".")[2].lower() in formats]
        if len(clips) > 1:
            raise MegaSoraError(f"{tar}: key {key!r} has {len(clips)} clips: {', '.join(c.name for c in clips)}")
        if clips:
            return clips[0]
    return None


def group_by_key(members: Iterable) -> Iterator[tuple[str, list]]:
    """(key, its members) for each run of adjacent members with one WebDataset key."""
    key, group = None, []
    for member in members:
        member_key = split_name(member.name)[0]
        if member_key != key and group:
            yield key, group
            group = []
        key = member_key
        group.append(member)
    if group:
        yield key, group


def caption_in_tar(file: BinaryIO, members: list) -> str | None:
    """The caption in KEY.txt, else under the key `caption` of KEY.json, else None."""
    for suffix in ("txt", "json"):
        for member in members:
            if member.name.lower().endswith("." + suffix):
                if member.size > MAX_CAPTION_BYTES:
                    raise ValueError(f"{member.name} has {member.size} bytes")
                file.seek(member.offset)
                text = file.read(member.size).decode("utf-8-sig")
                if suffix == "txt":
                    return one_line(text)
                caption = json.loads(text).get("caption")
                return None if caption is None else one_line(caption)
    return None


def common_folder(paths: list[Path]) -> Path:
    folder = paths[0].parent
    while not all(path.is_relative_to(folder) for path in paths):
        folder = folder.parent
    return folder


# ---------------------------------------------------------------- text


def read_text(path: Path, limit: int | None = MAX_CAPTION_BYTES) -> str:
    """A UTF-8 file, without its byte order mark. `limit`: largest size in bytes. Raises MegaSoraError."""
    size = path.stat().st_size
    if limit is not None and size > limit:
        raise MegaSoraError(f"{path} has {size} bytes; a caption is read from at most {limit}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MegaSoraError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from None


def one_line(caption: object) -> str:
    """The caption with consecutive white space as one space. ValueError for null, numbers and lone surrogates."""
    if not isinstance(caption, str):
        raise ValueError(f"{caption!r} is not text")
    caption.encode("utf-8")
    return " ".join(caption.split())
