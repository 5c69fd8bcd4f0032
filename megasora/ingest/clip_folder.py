"""The clips below a folder, by path, with their captions."""

from __future__ import annotations

from pathlib import Path

from megasora.data.media import Media
from megasora.ingest.captions import CaptionTables, find_caption, read_caption_file, read_table
from megasora.ingest.file_counts import FileCounts
from megasora.ingest.file_roles import find_roles
from megasora.ingest.listing import ClipSource, split_of


def clips_of_folder(source: Path, names: list[str], counts: FileCounts) -> list[ClipSource]:
    """The clips among the files `names`, paths relative to `source` in the order of the listing.

    A caption is NAME.txt, else the key `caption` of NAME.json, else a line {"file": ..., "caption": ...} of the nearest
    captions.jsonl in its folder or above, up to `source`.
    """
    roles = find_roles(names, counts)
    tables = CaptionTables(counts)
    for name in roles.tables:
        tables.add(name, read_table(source / name), str(source / name))

    def read_text(name: str) -> bytes:
        return read_caption_file(f"{source}/{name}")

    clips = []
    for name in roles.clips:
        path = source / name
        caption, rejection = find_caption(f"{source}/{name}", roles.texts[name], read_text)
        if caption is None and rejection is None:
            caption, rejection = tables.find(name)
        clips.append(ClipSource(Media(path), name, path.stat().st_size, split_of(name), caption, rejection))
    tables.count_unmatched(roles.clips)
    return clips
