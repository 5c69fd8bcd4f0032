"""Where clips come from, in the order that numbers them.

    a folder            every clip below it, by path
    a list, .txt        a path a line
    a list, .jsonl      {"file": ..., "caption": ..., "split": ..., "start": seconds, "end": seconds}; file is needed,
                        and where it is a tar, "member": the name of a clip in it
    tars                a .tar, a folder of them or a pattern: raw WebDataset, a clip and its caption under one key

The clips of a list are sorted by path, place in a tar and start, those of tars by tar and place in it. A clip's place
is its permanent sample id, so a source is read the same by everybody who takes part in an ingest.
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
from typing import Any

from megasora.data.shards import SPLITS
from megasora.data.tar import read_members, split_name
from megasora.data.video import IMAGE_FORMATS, VIDEO_FORMATS, Media, is_clip
from megasora.errors import MegaSoraError

MAX_CAPTION_BYTES = 1 << 24  # of a file with a caption in it
CLIP_SUFFIXES = [suffix[1:] for suffix in (*VIDEO_FORMATS, *IMAGE_FORMATS)]


@dataclass(frozen=True)
class Source:
    media: Media
    name: str  # for people: the path below the source, or TAR/MEMBER
    size: int  # bytes
    split: str
    caption: str | None
    fault: str = ""  # why the caption of a tar's clip cannot be read


def find_clips(source: Path) -> list[Source]:
    """Every clip of `source`; its place is its sample id. Raises MegaSoraError, also where there is none."""
    if source.is_dir():
        tars = sorted(p for p in source.rglob("*.tar") if p.is_file() and not p.name.startswith("."))
        found = list(clips_of_tars(tars, source)) if tars else clips_of_folder(source)
        if tars and any(is_clip(p) for p in source.rglob("*") if not p.name.startswith(".")):
            raise MegaSoraError(f"{source} holds both tars and clips; ingest them apart, or give a list of the clips")
    elif source.suffix.lower() == ".tar" and source.is_file():
        found = list(clips_of_tars([source], source.parent))
    elif source.suffix.lower() in (".txt", ".jsonl") and source.is_file():
        found = clips_of_list(source)
    elif re.search(r"[*?\[]", str(source)):
        tars = sorted(Path(name) for name in glob.glob(str(source), recursive=True) if name.endswith(".tar"))
        if not tars:
            raise MegaSoraError(f"no .tar file matches {source}")
        found = list(clips_of_tars(tars, common_folder(tars)))
    else:
        raise MegaSoraError(
            f"{source} is not a folder; give the folder that holds the clips, a list (.txt, .jsonl), or tars"
        )
    if not found:
        raise MegaSoraError(
            f"no clip in {source}: looked for .mp4 .mov .mkv .webm .avi .png .jpg .webp files, and .tar files of such"
        )
    return found


def listing_hash(clips: Iterable[Source]) -> str:
    """SHA-256 of names, sizes, parts, splits and captions: another listing numbers other clips."""
    digest = hashlib.sha256()
    for clip in clips:
        media = clip.media
        digest.update(
            json.dumps([clip.name, clip.size, media.start, media.end, clip.split, clip.caption, clip.fault]).encode()
        )
    return digest.hexdigest()


# ---------------------------------------------------------------- a folder


def clips_of_folder(source: Path) -> list[Source]:
    captions = Captions(source)
    paths = sorted(p for p in source.rglob("*") if is_clip(p) and p.is_file() and not p.name.startswith("."))
    found = []
    for path in paths:
        below = path.relative_to(source)
        found.append(
            Source(Media(path), below.as_posix(), path.stat().st_size, split_of(below), captions.find(path, source))
        )
    return found


def split_of(below: Path) -> str:
    return "val" if below.parts[0] == "val" else "train"


class Captions:
    """NAME.txt, the key `caption` of NAME.json, or a line {"file": ..., "caption": ...} of a captions.jsonl in the same
    folder or above it, up to `source`."""

    def __init__(self, source: Path):
        self.tables = {table.parent: read_table(table) for table in sorted(source.rglob("captions.jsonl"))}

    def find(self, path: Path, source: Path) -> str | None:
        caption = caption_beside(path)
        if caption is not None:
            return caption
        for folder in (path.parent, *path.parents):
            caption = self.tables.get(folder, {}).get(path.relative_to(folder).as_posix())
            if caption is not None or folder == source:
                return caption
        return None


def read_table(table: Path) -> dict[str, str]:
    return {name: one_line(values["caption"]) for _, name, values in read_lines(table, ("caption",))}


def caption_beside(path: Path) -> str | None:
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


def clips_of_list(table: Path) -> list[Source]:
    lines = read_lines(table, ()) if table.suffix.lower() == ".jsonl" else read_names(table)
    tars = Tars()
    found = [source_of_line(table, number, name, values, tars) for number, name, values in lines]
    found.sort(key=lambda c: (c.media.path, c.media.offset, c.media.start, c.media.end or math.inf))
    for before, clip in zip(found, found[1:], strict=False):
        if before.media == clip.media:
            raise MegaSoraError(f"{table} lists {clip.media} twice")
    return found


class Tars:
    """The clips of tars by name, each tar read once."""

    def __init__(self) -> None:
        self.found: dict[Path, dict[str, Source]] = {}

    def clip(self, tar: Path, member: str) -> Source | None:
        if tar not in self.found:
            self.found[tar] = {source.media.name: source for source in clips_of_tars([tar], tar.parent)}
        return self.found[tar].get(member)


def source_of_line(table: Path, number: int, name: str, values: dict[str, Any], tars: Tars) -> Source:
    path, member = table.parent / name, values.get("member")
    if member is None and path.suffix.lower() == ".tar":
        raise MegaSoraError(f'{table}:{number}: {name} is a tar; name a clip in it, in a .jsonl: "member": "NAME.mp4"')
    if member is None and not is_clip(path):
        raise MegaSoraError(f"{table}:{number}: {name} is no clip: .mp4 .mov .mkv .webm .avi .png .jpg .webp are")
    if not path.is_file():
        raise MegaSoraError(f"{table}:{number}: {path} is not there; names are taken from the folder of the list")
    if member is None:
        whole = Source(Media(path), name, path.stat().st_size, split_of(Path(name)), None)
    else:
        inside = tars.clip(path, member) if isinstance(member, str) else None
        if inside is None:
            raise MegaSoraError(f"{table}:{number}: {path} holds no clip of the name {member!r}")
        whole = replace(inside, name=f"{name}/{member}")
    split = values.get("split") or ("val" if split_of(Path(name)) == "val" else whole.split)
    if split not in SPLITS:
        raise MegaSoraError(f"{table}:{number}: split {split!r} is none of {', '.join(SPLITS)}")
    start, end = values.get("start") or 0.0, values.get("end")
    for second in (start, *([] if end is None else [end])):
        if isinstance(second, bool) or not isinstance(second, (int, float)) or not 0 <= second < math.inf:
            raise MegaSoraError(f"{table}:{number}: start and end are seconds, not {second!r}")
    if end is not None and end <= start:
        raise MegaSoraError(f"{table}:{number}: end={end} is not behind start={start}")
    if "caption" in values:
        try:
            whole = replace(whole, caption=None if values["caption"] is None else one_line(values["caption"]), fault="")
        except ValueError as error:
            raise MegaSoraError(f"{table}:{number}: the caption: {error}") from None
    elif member is None:
        whole = replace(whole, caption=caption_beside(path))
    media = replace(whole.media, start=float(start), end=None if end is None else float(end))
    return replace(whole, media=media, split=split)


def read_names(table: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    for number, line in enumerate(read_text(table).split("\n"), 1):
        if line.strip():
            yield number, line.rstrip("\r"), {}


def read_lines(table: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Line number, file and values of each line that is not empty."""
    for number, line in enumerate(read_text(table, limit=None).split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            name = values["file"]
            if not isinstance(name, str) or not name or "\0" in name:
                raise ValueError(f"{name!r} is no name of a file")
            for key in needed:
                one_line(values[key])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise MegaSoraError(f'{table}:{number} is not {{"file": "NAME.mp4", "caption": "..."}}') from None
        yield number, name, values


# ---------------------------------------------------------------- tars


class ClipFiles(Collection):
    """What is read of a raw tar: members whose name ends as that of a clip or a caption; `a.b.mp4` too."""

    known = (*CLIP_SUFFIXES, "txt", "json")

    def __contains__(self, extension: object) -> bool:
        return isinstance(extension, str) and extension.rpartition(".")[2] in self.known

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)


def clips_of_tars(tars: list[Path], base: Path) -> Iterator[Source]:
    """Members of one key lie together; of a video and an image with one key, the image is a thumbnail of the video."""
    for tar in tars:
        below = tar.relative_to(base) if tar.is_relative_to(base) else Path(tar.name)
        split = "val" if split_of(below) == "val" or re.match(r"val\b", tar.name) else "train"
        with open(tar, "rb") as file:
            members = read_members(file, ClipFiles(), str(tar), others="skip")
            for key, found in by_key(members):
                clips = [m for m in found if "." + m.name.rpartition(".")[2].lower() in VIDEO_FORMATS]
                clips = clips or [m for m in found if "." + m.name.rpartition(".")[2].lower() in IMAGE_FORMATS]
                if len(clips) > 1:
                    raise MegaSoraError(
                        f"{tar}: key {key!r} has {len(clips)} clips: {', '.join(c.name for c in clips)}"
                    )
                if not clips:
                    continue
                caption, fault = None, ""
                try:
                    caption = caption_in_tar(file, found)
                except (ValueError, TypeError, AttributeError, RecursionError) as error:
                    fault = f"the caption of {clips[0].name} in {tar} cannot be read: {error!r}"
                media = Media(tar, clips[0].name, clips[0].offset, clips[0].size)
                yield Source(media, f"{below.as_posix()}/{clips[0].name}", clips[0].size, split, caption, fault)


def by_key(members: Iterable) -> Iterator[tuple[str, list]]:
    key, found = None, []
    for member in members:
        this = split_name(member.name)[0]
        if this != key and found:
            yield key, found
            found = []
        key = this
        found.append(member)
    if found:
        yield key, found


def caption_in_tar(file, members: list) -> str | None:
    """KEY.txt, else the key `caption` of KEY.json, where it has one."""
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
    size = path.stat().st_size
    if limit is not None and size > limit:
        raise MegaSoraError(f"{path} has {size} bytes; a caption is read from at most {limit}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MegaSoraError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from None


def one_line(caption: object) -> str:
    """White space runs become one space. Raises ValueError for what is not text: null, numbers, half a character."""
    if not isinstance(caption, str):
        raise ValueError(f"{caption!r} is not text")
    caption.encode("utf-8")
    return " ".join(caption.split())
