"""Counts what a source holds: every file is a clip, or is counted as what it is, so that none is lost unnoticed."""

from __future__ import annotations

from collections import Counter
from typing import Any

CLIP, CAPTION, THUMBNAIL, HIDDEN = "clip", "caption", "thumbnail", "hidden"
NO_CLIP_TEXT, OTHER_SUFFIX = "text without a clip", "other suffix"
NOT_REGULAR, BROKEN_LINK, SEEN_FOLDER = "not a regular file", "broken link", "folder seen before"
UNREADABLE_FOLDER = "unreadable folder"
# kinds of files that are no clips, in the order in which they are shown: name of one, name of several
KINDS = {
    CAPTION: ("caption", "captions"),
    HIDDEN: ("hidden file", "hidden files"),
    THUMBNAIL: ("thumbnail of a video", "thumbnails of videos"),
    NO_CLIP_TEXT: ("text without a clip", "texts without a clip"),
    OTHER_SUFFIX: ("file with another suffix", "files with other suffixes"),
    NOT_REGULAR: ("FIFO, socket or device", "FIFOs, sockets or devices"),
    BROKEN_LINK: ("broken link", "broken links"),
    SEEN_FOLDER: ("link to a folder seen before", "links to folders seen before"),
    UNREADABLE_FOLDER: ("unreadable folder", "unreadable folders"),
}
EXPECTED = (CAPTION, HIDDEN)  # kinds that are not worth a line
MATCHES_NO_CLIP, REPEATED, NO_LINE = "matches no clip", "repeats the file of another", "clip without a line"
LINES = {
    MATCHES_NO_CLIP: ("line matches no clip", "lines match no clip"),
    REPEATED: ("line repeats the file of an earlier one, which it replaces", "lines repeat the files of earlier ones"),
    NO_LINE: ("clip has no line and no other caption", "clips have no line and no other caption"),
}
MAX_EXAMPLES = 3
MAX_SUFFIXES = 8  # shown
NO_SUFFIX = "none"


class FileCounts:
    """The files of a source by kind, those of other suffixes by suffix, and the lines of captions.jsonl files."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.suffixes: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}  # kind -> names of files, or of the files of lines

    def add(self, kind: str, name: str) -> None:
        """Counts a file that is a CLIP or one of KINDS."""
        self.kinds[kind] += 1
        if kind in KINDS and kind not in EXPECTED:
            self.add_example(kind, name)

    def add_other(self, name: str, suffix: str) -> None:
        """Counts a file whose suffix is not that of a clip or a caption."""
        self.add(OTHER_SUFFIX, name)
        self.suffixes[suffix or NO_SUFFIX] += 1

    def add_line(self, kind: str, name: str) -> None:
        """Counts something that is wrong with a line of captions.jsonl: one of LINES."""
        self.lines[kind] += 1
        self.add_example(kind, name)

    def add_example(self, kind: str, name: str) -> None:
        examples = self.examples.setdefault(kind, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(name)

    @property
    def num_files(self) -> int:
        return self.kinds.total()

    def details(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return {
            "files": dict(sorted(self.kinds.items())),
            "other_suffixes": dict(self.frequent_suffixes(100)),
            "caption_lines": dict(sorted(self.lines.items())),
            "examples": dict(sorted(self.examples.items())),
        }

    def describe(self) -> list[str]:
        """Lines for people: nothing if there are only clips, captions and hidden files."""
        lines = []
        if self.kinds.keys() - {CLIP, *EXPECTED}:
            parts = [f"{self.kinds[CLIP]:,} {'clip' if self.kinds[CLIP] == 1 else 'clips'}"]
            parts += [self.describe_kind(kind) for kind in KINDS if self.kinds[kind]]
            lines.append(f"{self.num_files:,} files: {', '.join(parts)}")
        if self.lines:
            parts = [f"{counted(n, LINES[kind])}{self.named(kind)}" for kind, n in self.lines.items()]
            lines.append(f"captions.jsonl: {'; '.join(parts)}")
        return lines

    def describe_kind(self, kind: str) -> str:
        text = counted(self.kinds[kind], KINDS[kind])
        if kind == OTHER_SUFFIX:
            return f"{text} ({self.describe_suffixes()})"
        return text if kind in EXPECTED else text + self.named(kind)

    def describe_suffixes(self) -> str:
        """`8 .heic, 4 .xyz`: the most frequent suffixes."""
        shown = self.frequent_suffixes(MAX_SUFFIXES)
        parts = [f"{count:,} {'without suffix' if suffix == NO_SUFFIX else suffix}" for suffix, count in shown]
        return ", ".join([*parts, *(["..."] if len(self.suffixes) > MAX_SUFFIXES else [])])

    def frequent_suffixes(self, number: int) -> list[tuple[str, int]]:
        return sorted(self.suffixes.items(), key=lambda item: (-item[1], item[0]))[:number]

    def named(self, kind: str) -> str:
        """` (a.mp4, b.mp4, ...)`: the first names of a kind."""
        names = self.examples[kind]
        more = (self.kinds[kind] or self.lines[kind]) > len(names)
        return f" ({', '.join(names)}{', ...' if more else ''})"


def counted(number: int, names: tuple[str, str]) -> str:
    """`1 file`, `2,000 files`: a number with the name of one or of several."""
    return f"{number:,} {names[number != 1]}"
