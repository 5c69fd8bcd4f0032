"""Reads captions: from NAME.txt, NAME.json or lines of captions.jsonl, which may be files or members of a tar.

A caption that cannot be read costs its clip, never the ingest: it becomes a Rejection with a reason.
"""

from __future__ import annotations

import errno
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megasora.errors import MegaSoraError
from megasora.files import open_regular
from megasora.ingest.file_counts import MATCHES_NO_CLIP, NO_LINE, REPEATED, FileCounts
from megasora.ingest.results import Rejection
from megasora.jsonl import parse_json

MAX_CAPTION_BYTES = 1 << 24  # size of a file that a caption is read from
NOT_UTF8, UNREADABLE = "caption not utf-8", "unreadable caption"


def one_line(caption: object) -> str:
    """The caption with consecutive white space as one space. ValueError for null and numbers, UnicodeEncodeError for
    lone surrogates, which stand for bytes that are no UTF-8."""
    if not isinstance(caption, str):
        raise ValueError(f"{repr(caption)[:40]} is not text")
    caption.encode("utf-8")
    return " ".join(caption.split())


def parse_caption(name: str, data: bytes) -> str | None:
    """The caption in a file NAME.txt, or under the key `caption` of a file NAME.json; None where the key is missing or
    null. Raises ValueError, or UnicodeError for what is no UTF-8."""
    text = data.decode("utf-8-sig")
    if not name.lower().endswith(".json"):
        return one_line(text)
    values = parse_json(text)
    if not isinstance(values, dict):
        raise ValueError('no JSON object with a text under the key "caption"')
    caption = values.get("caption")
    return None if caption is None else one_line(caption)


def find_caption(clip: str, texts: Iterable[str], read: Callable[[str], bytes]) -> tuple[str | None, Rejection | None]:
    """The caption in the first of `texts` that has one, and why it cannot be read; None and None where there is none.

    `clip`: its name, for messages; `read(name)`: the bytes of a file.
    """
    for name in texts:
        try:
            caption = parse_caption(name, read(name))
        except (OSError, ValueError) as error:
            return None, unreadable(clip, f"{name}: {error}", error)
        if caption is not None:
            return caption, None
    return None, None


def unreadable(clip: str, problem: str, error: Exception) -> Rejection:
    """The rejection of a clip whose caption cannot be read because of `error`."""
    if isinstance(error, UnicodeError):
        return Rejection("caption", NOT_UTF8, f"{clip}: its caption is not UTF-8 text: {problem}; save it as UTF-8")
    return Rejection("caption", UNREADABLE, f"{clip}: its caption cannot be read: {problem}")


def read_caption_file(path: str | Path) -> bytes:
    """The bytes of a regular file of at most MAX_CAPTION_BYTES. Raises OSError."""
    with open_regular(path) as file:
        check_caption_size(os.fstat(file.fileno()).st_size, str(path))
        return file.readall()


def check_caption_size(size: int, name: str) -> None:
    """Raises OSError for a file of more than MAX_CAPTION_BYTES."""
    if size > MAX_CAPTION_BYTES:
        raise OSError(errno.EFBIG, f"more than {MAX_CAPTION_BYTES} bytes", name)


# ---------------------------------------------------------------- lines


def read_lines(table: Path) -> list[str]:
    """The lines of a file, without the byte order mark; bytes that are no UTF-8 become surrogates, as in file names."""
    return split_lines(read_table(table))


def read_table(table: Path) -> bytes:
    """The bytes of a regular file. Raises OSError."""
    with open_regular(table) as file:
        return file.readall()


def split_lines(data: bytes) -> list[str]:
    return [line.rstrip("\r") for line in data.decode("utf-8-sig", "surrogateescape").split("\n")]


def parse_json_lines(table: str, lines: list[str]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Line number, file name and values of each line that is not empty. `table`: for messages. Raises MegaSoraError."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = parse_json(line)
            name = values["file"]
            if not isinstance(name, str) or not name or "\0" in name:
                raise ValueError(f"{name!r} is not a file name")
        except (ValueError, KeyError, TypeError):
            raise MegaSoraError(f'{table}:{number} is not {{"file": "NAME.mp4", "caption": "..."}}') from None
        yield number, name, values


class CaptionTables:
    """The captions.jsonl files of a folder or a tar: each gives captions to clips in its own folder and below.

    A clip has the caption of the nearest table with a line for it.
    """

    def __init__(self, counts: FileCounts) -> None:
        self.counts = counts
        self.tables: dict[str, dict[str, str | Rejection]] = {}  # folder -> clip -> caption; names below the source

    def add(self, name: str, data: bytes, shown: str) -> None:
        """Reads the table `name`, a path below the source; `shown`: its name in messages. Raises MegaSoraError."""
        folder = posixpath.dirname(name)
        captions = self.tables.setdefault(folder, {})
        for number, file, values in parse_json_lines(shown, split_lines(data)):
            clip = posixpath.normpath(posixpath.join(folder, file))
            if clip in captions:
                self.counts.add_line(REPEATED, file)
            try:
                captions[clip] = one_line(values["caption"])
            except UnicodeError as error:
                captions[clip] = unreadable(clip, f"{shown}:{number}: {error}", error)
            except (ValueError, KeyError):
                raise MegaSoraError(f'{shown}:{number} is not {{"file": "NAME.mp4", "caption": "..."}}') from None

    def find(self, clip: str) -> tuple[str | None, Rejection | None]:
        """The caption of a clip, a path below the source, or why it cannot be read."""
        folder = posixpath.dirname(clip)
        has_table = False
        while True:
            table = self.tables.get(folder)
            has_table = has_table or table is not None
            caption = table and table.get(clip)
            if caption is not None:
                return (None, caption) if isinstance(caption, Rejection) else (caption, None)
            if not folder:
                break
            folder = posixpath.dirname(folder)
        if has_table:
            self.counts.add_line(NO_LINE, clip)
        return None, None

    def count_unmatched(self, clips: Iterable[str]) -> None:
        """Counts the lines whose file is none of `clips`."""
        known = set(clips)
        for table in self.tables.values():
            for file in table:
                if file not in known:
                    self.counts.add_line(MATCHES_NO_CLIP, file)
