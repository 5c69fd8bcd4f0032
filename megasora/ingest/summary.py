"""Counts of rejected clips while a block is written, and what an ingest reports at its end, as JSON and as tables."""

from __future__ import annotations

from collections import Counter
from typing import Any

from megasora.data.shard_format import Manifest
from megasora.errors import printable
from megasora.ingest.library_warnings import LibraryWarnings
from megasora.ingest.listing import Listing
from megasora.ingest.results import Rejection

# in the order in which they see a clip
FILTERS = ("caption", "decode", "duration", "motion and contrast", "codec", "scores")
MAX_EXAMPLES = 5  # messages per reason, in a block and in the table
MAX_WARNINGS = 10  # kinds of warnings in the table


class Rejections:
    """The rejected clips of one block, by filter and reason."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.by_filter: dict[str, Counter[str]] = {}
        self.examples: dict[str, list[str]] = {}  # reason -> messages
        self.first = ""  # message

    def add(self, rejection: Rejection) -> None:
        reason, message = rejection.reason, rejection.message.encode("utf-8", "replace").decode()
        self.reasons[reason] += 1
        self.by_filter.setdefault(rejection.filter_name, Counter())[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(message)
        self.first = self.first or message

    def details(self) -> dict[str, Any]:
        """What the block's JSON file records of them."""
        by_filter = {name: dict(reasons) for name, reasons in self.by_filter.items()}
        return {"rejected_by_filter": by_filter, "examples": self.examples, "first_rejection": self.first}


def merge_warnings(printed: LibraryWarnings, details: list[dict[str, Any]]) -> None:
    """Adds the warnings of each block to `printed`."""
    for block in details:
        printed.update(block.get("warnings", {}))


def build_report(listing: Listing, manifest: Manifest, printed: LibraryWarnings) -> dict[str, Any]:
    """What became of every file of the source: kinds of files, clips accepted and rejected, warnings of libraries."""
    accepted = sum(counts["clips"] for counts in manifest.splits.values())
    clips = {"accepted": accepted, "rejected": sum(manifest.rejected.values())}
    return {**listing.files.details(), "clips": clips, "warnings": printed.details()}


def print_summary(
    manifest: Manifest, listing: Listing, details: list[dict[str, Any]], printed: LibraryWarnings
) -> None:
    """Prints clips per split, and per filter and reason; files that are no clips, and warnings of libraries, if any.

    `details`: `Rejections.details()` of each block.
    """
    from rich.console import Console

    console = Console()
    console.print(split_table(manifest))
    if manifest.rejected:
        console.print(filter_table(len(listing.clips), details))
        console.print(reason_table(manifest, details))
    if printed.kinds:
        console.print(warning_table(printed))
    for line in listing.files.describe():
        console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def split_table(manifest: Manifest):
    from rich.table import Table

    table = Table("split", "clips", "of these images", "frames", "tokens", "longest clip, tokens", "shards")
    for split, counts in manifest.splits.items():
        cells = [f"{counts[k]:,}" for k in ("clips", "images", "frames", "tokens", "max_tokens")]
        table.add_row(split, *cells, str(len(counts["shards"])))
    return table


def filter_table(num_clips: int, details: list[dict[str, Any]]):
    from rich.markup import escape
    from rich.table import Table

    table = Table("filter", "clips", "accepted", "rejected", "reasons")
    for name, arriving, reasons in filter_rows(num_clips, details):
        rejected = reasons.total()
        shown = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        table.add_row(name, f"{arriving:,}", f"{arriving - rejected:,}", f"{rejected:,}", escape(shown))
    return table


def reason_table(manifest: Manifest, details: list[dict[str, Any]]):
    from rich.markup import escape
    from rich.table import Table

    table = Table("reason", "rejected clips", "examples")
    for reason, count in sorted(manifest.rejected.items(), key=lambda item: -item[1]):
        examples = [message for block in details for message in block["examples"].get(reason, [])]
        table.add_row(reason, f"{count:,}", escape("\n".join(map(printable, examples[:MAX_EXAMPLES]))))
    return table


def warning_table(printed: LibraryWarnings):
    from rich.markup import escape
    from rich.table import Table

    table = Table("warnings of libraries", "example")
    for number, example in list(printed.details().values())[:MAX_WARNINGS]:
        table.add_row(f"{number:,}", escape(printable(example)))
    return table


def filter_rows(num_clips: int, details: list[dict[str, Any]]) -> list[tuple[str, int, Counter[str]]]:
    """(filter, clips that reached it, rejected clips by reason), for decoding and each filter that rejected a clip."""
    rows, arriving = [], num_clips
    for name in FILTERS:
        reasons: Counter[str] = Counter()
        for block in details:
            reasons.update(block["rejected_by_filter"].get(name, {}))
        if reasons or name == "decode":
            rows.append((name, arriving, reasons))
        arriving -= reasons.total()
    return rows
