"""What an ingest took and what it left out, as tables."""

from __future__ import annotations

from collections import Counter
from typing import Any

from megasora.data.shards import Manifest

# in the order in which a clip meets them
STAGES = ("caption", "decode", "length", "motion and contrast", "codec", "scores")
SHOWN_REJECTIONS = 5  # examples a reason


def print_summary(manifest: Manifest, num_clips: int, details: list[dict[str, Any]]) -> None:
    """`details`: of each block, as `run.Counts` leaves them."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table("split", "clips", "of these images", "frames", "tokens", "longest clip, tokens", "shards")
    for split, counts in manifest.splits.items():
        numbers = [f"{counts[k]:,}" for k in ("clips", "images", "frames", "tokens", "longest")]
        table.add_row(split, *numbers, str(len(counts["shards"])))
    console.print(table)
    if not manifest.rejected:
        return
    table = Table("stage", "clips", "kept", "dropped", "because")
    for stage, arriving, reasons in stage_rows(num_clips, details):
        dropped = reasons.total()
        because = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
        table.add_row(stage, f"{arriving:,}", f"{arriving - dropped:,}", f"{dropped:,}", escape(because))
    console.print(table)
    table = Table("rejected because", "clips", "for example")
    for reason, count in sorted(manifest.rejected.items(), key=lambda item: -item[1]):
        examples = [text for block in details for text in block["examples"].get(reason, [])]
        table.add_row(reason, f"{count:,}", escape("\n".join(examples[:SHOWN_REJECTIONS])))
    console.print(table)


def stage_rows(num_clips: int, details: list[dict[str, Any]]) -> list[tuple[str, int, Counter[str]]]:
    """Of each stage that dropped a clip, and of decoding: clips that arrived, and how many it dropped for what."""
    rows, arriving = [], num_clips
    for stage in STAGES:
        reasons: Counter[str] = Counter()
        for block in details:
            reasons.update(block["stages"].get(stage, {}))
        if reasons or stage == "decode":
            rows.append((stage, arriving, reasons))
        arriving -= reasons.total()
    return rows
