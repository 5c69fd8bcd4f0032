"""The clips in raw WebDataset tars, by tar and position in it, with their captions.

The same files give the same clips in a folder and in a tar; a tar also has the rule of WebDataset's keys
(file_roles.py). Files of one key need not be adjacent: `tar` writes a folder in any order.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from megasora.data.media import Media
from megasora.data.tar import BLOCK_BYTES, DamagedTar, Member, read_files
from megasora.files import open_regular
from megasora.ingest.captions import CaptionTables, check_caption_size, find_caption
from megasora.ingest.file_counts import FileCounts
from megasora.ingest.file_roles import find_roles
from megasora.ingest.listing import ClipSource, split_of


def clips_of_tars(tars: list[Path], base: Path, counts: FileCounts) -> Iterator[ClipSource]:
    """Raises DamagedTar for an archive that cannot be read to its end. `base`: the folder that names are below."""
    for tar in tars:
        name = tar.relative_to(base) if tar.is_relative_to(base) else Path(tar.name)
        is_val = split_of(name) == "val" or re.match(r"val\b", tar.name) is not None
        with io.BufferedReader(open_regular(tar)) as file:
            yield from clips_of_tar(file, tar, name.as_posix(), is_val, counts)


def clips_of_tar(file: BinaryIO, tar: Path, tar_name: str, is_val: bool, counts: FileCounts) -> list[ClipSource]:
    """The clips of one tar; those in its folder `val` are for validation, or, `is_val`, all of them."""
    members = members_by_name(file, str(tar))
    roles = find_roles(members, counts, by_key=True)

    def read(name: str) -> bytes:
        check_caption_size(members[name].size, name)
        file.seek(members[name].offset)
        return file.read(members[name].size)

    tables = CaptionTables(counts)
    for name in roles.tables:
        file.seek(members[name].offset)
        tables.add(name, file.read(members[name].size), f"{tar}: {name}")
    clips = []
    for name in roles.clips:
        caption, rejection = find_caption(f"{tar}: {name}", roles.texts[name], read)
        if caption is None and rejection is None:
            caption, rejection = tables.find(name)
        _, offset, size = members[name]
        split = "val" if is_val else split_of(name)
        clips.append(ClipSource(Media(tar, name, offset, size), f"{tar_name}/{name}", size, split, caption, rejection))
    tables.count_unmatched(roles.clips)
    return clips


def members_by_name(file: BinaryIO, path: str) -> dict[str, Member]:
    """The files of an archive in their order. Raises DamagedTar, also for a name that occurs twice."""
    members: dict[str, Member] = {}
    for member in read_files(file, path):
        if member.name in members:
            raise DamagedTar(path, member.offset - BLOCK_BYTES, f"{member.name!r} occurs twice")
        members[member.name] = member
    return members
