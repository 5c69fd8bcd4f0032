"""`megasora codec eval`: how well a codec reconstructs clips.

DIR/eval.json   figures of each clip and in total; the clips that were skipped, and why
DIR/sheet.png   of some clips: originals, reconstructions, differences
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megasora.codec import build_codec
from megasora.commands.codec import codec_settings
from megasora.commands.codec_measure import Measurement, SheetFrames
from megasora.data.clip_reader import open_clip
from megasora.data.clip_writer import write_image
from megasora.data.media import RejectedClip
from megasora.errors import MegaSoraError, describe, printable
from megasora.files import check_folder, write_text_atomic
from megasora.ingest.listing import ClipSource
from megasora.ingest.sources import find_clips
from megasora.jsonl import finite_or_none
from megasora.sampling.sheet import contact_sheet

FORMAT = 1
SHEET_CLIPS, MAX_TITLE = 8, 100
MAX_ROWS = 50  # clips in the table that is printed
COLUMNS = {  # title of a column -> text of a figure
    "frames": "{frames:,}", "PSNR dB": "{psnr:.2f}", "SSIM": "{ssim:.4f}", "flicker": "{flicker:.4f}",
    "latents / value": "{latents_per_pixel_value:.4f}",
}  # fmt: skip


def eval_codec(
    source: Path, codec_path: str, out: Path, split: str | None, limit: int | None, overrides: list[str]
) -> None:
    """Writes eval.json and sheet.png into `out`, prints a table. `limit`: clips, evenly spaced.

    `split`: train, val, all, or None: val if there is one, else all. Raises MegaSoraError, also if no clip is usable.
    """
    check_folder(out, f"--out {out}")
    if limit is not None and limit < 1:
        raise MegaSoraError(f"--clips {limit} must be at least 1")
    config = codec_settings(codec_path, overrides)
    split, clips = choose_clips(find_clips(source).clips, split, limit, source)
    codec = build_codec(config.codec)
    measurement, results, skipped, rows = Measurement(codec), [], [], []
    on_sheet = set(np.linspace(0, len(clips) - 1, min(SHEET_CLIPS, len(clips))).round().astype(int).tolist())
    with clip_progress(len(clips)) as advance:
        for index, clip in enumerate(clips):
            sheet = SheetFrames() if index in on_sheet else None
            try:
                with open_clip(clip.media, config.ingest) as opened:
                    figures = measurement.add_clip(opened, sheet)
            except (RejectedClip, OSError, MemoryError) as error:
                reason = describe(error) or type(error).__name__
                skipped.append({"clip": clip.name, "reason": reason})
            else:
                results.append({"clip": clip.name, **figures})
                rows += sheet.videos(printable(clip.name, MAX_TITLE)) if sheet else []
            advance()
    if not results:
        raise MegaSoraError(f"none of {len(clips)} clips of {source} could be used; the first: {skipped[0]['reason']}")
    totals = measurement.totals()
    values = {
        "format": FORMAT, "codec": codec.fingerprint, "settings": asdict(config.codec), "source": str(source),
        "split": split, "total": totals, "clips": results, "skipped": skipped,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    if rows:
        write_image(contact_sheet(rows, zoom=1), out / "sheet.png", json.dumps({"codec": codec.fingerprint}))
    write_text_atomic(out / "eval.json", json.dumps(finite_or_none(values), indent=1, allow_nan=False) + "\n")
    print_table(values, out)


def choose_clips(
    clips: list[ClipSource], split: str | None, limit: int | None, source: Path
) -> tuple[str, list[ClipSource]]:
    """The split and its clips, at most `limit`, evenly spaced. Raises MegaSoraError if there is none."""
    has_val = any(clip.split == "val" for clip in clips)
    split = split or ("val" if has_val else "all")
    chosen = [clip for clip in clips if split in ("all", clip.split)]
    if not chosen:
        other = "train" if split == "val" else "val"
        raise MegaSoraError(f"{source} has no clip of --split {split}; its {len(clips)} clips are of {other}")
    if limit is not None and limit < len(chosen):
        chosen = [chosen[i] for i in np.linspace(0, len(chosen) - 1, limit).round().astype(int)]
    return split, chosen


def print_table(values: dict[str, Any], out: Path) -> None:
    """Prints the figures of each clip and in total."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, total, results = Console(), values["total"], values["clips"]
    table = Table("clip", "size", *COLUMNS)
    for clip in results[:MAX_ROWS]:
        cells = [text.format(**clip) for text in COLUMNS.values()]
        table.add_row(escape(printable(clip["clip"], MAX_TITLE)), f"{clip['height']}x{clip['width']}", *cells)
    if len(results) > MAX_ROWS:
        table.add_row(f"{len(results) - MAX_ROWS} more, see eval.json", "")
    table.add_section()
    table.add_row(f"{total['clips']} clips", "", *(text.format(**total) for text in COLUMNS.values()))
    console.print(table)
    for skipped in values["skipped"]:
        print(f"skipped {printable(skipped['reason'])}")
    count = f", {len(values['skipped'])} skipped" if values["skipped"] else ""
    std = total["latent_std"]
    print(
        f"codec {printable(values['codec'])}: PSNR of the mean error {total['psnr_of_mean_error']:.2f} dB; "
        f"latents have standard deviations {min(std):.2f} to {max(std):.2f}; frames per CPU second: "
        f"{total['encode_frames_per_cpu_second'] or 0:,.0f} encoded, {total['decode_frames_per_cpu_second'] or 0:,.0f} "
        "decoded"
    )
    print(f"{total['clips']} clips of split {values['split']}{count}; figures and contact sheet in {out}")


@contextmanager
def clip_progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal's standard error; yields a function that advances it by one clip."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("eval"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("eval", total=total)
        yield lambda: bar.advance(task)
