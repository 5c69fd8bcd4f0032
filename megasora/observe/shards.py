"""What `megasora shards` says of a folder of shards: counts and lengths, every fault, and what a clip looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megasora.codec import build_codec
from megasora.config import CodecConfig, DataConfig
from megasora.data.folder import open_folder
from megasora.data.patches import frames_to_uint8, unpatchify
from megasora.data.shards import SPLITS, Manifest, Shards, read_manifest
from megasora.data.verify import num_bytes, verify
from megasora.errors import MegaSoraError

BARS = 12
SHOWN_PIXELS = 1 << 25  # of all frames that are decoded to draw a clip: 16 frames of 1080p


def describe_shards(folder: str | Path, budget: int | None = None) -> None:
    """Prints counts, sizes, a histogram, and the padding in packs of `budget` tokens, where it is given."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    place = open_folder(folder)
    console, manifest, sizes = Console(), read_manifest(place), place.sizes()
    console.print(
        f"codec {escape(manifest.codec)}   text {escape(manifest.text)}   patch {escape(str(manifest.patch))}   "
        f"patches {manifest.dtype}   format {manifest.format}"
    )
    table = Table("split", "clips", "of these images", "frames", "tokens", "longest clip, tokens", "shards", "MiB")
    for split, counts in manifest.splits.items():
        mib = sum(sizes.get(name, 0) for name in counts["shards"]) / 2**20
        numbers = [f"{counts[k]:,}" for k in ("clips", "images", "frames", "tokens", "longest")]
        table.add_row(split, *numbers, str(len(counts["shards"])), f"{mib:,.1f}")
    console.print(table)
    if manifest.rejected:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest.rejected.items())
        console.print(f"left out: {escape(reasons)}")
    tokens = Shards.open(folder, "train", strict=False).tokens()
    if budget is not None:
        print(expected_padding(tokens, budget))
    if len(tokens):
        console.print("tokens a clip, train split")
        edges = np.unique(np.geomspace(tokens.min(), tokens.max() + 1, BARS + 1).round().astype(int))
        counts, edges = np.histogram(tokens, edges if len(edges) > 1 else 1)
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
            console.print(f"{int(low):>9,} ..{int(high) - 1:>9,} {count:>9,} {'█' * round(40 * count / counts.max())}")


def expected_padding(tokens: np.ndarray, budget: int) -> str:
    """How full the packs of an epoch are, planned as a run plans them with the lookahead of the defaults."""
    from megasora.data.plan import Plan

    if budget < 1:
        raise MegaSoraError(f"--budget {budget} must be at least 1 token")
    fitting = tokens[tokens <= budget]
    words = ""
    if left_out := len(tokens) - len(fitting):
        words = f"; longer clips, left out here: {left_out:,} (the longest has {tokens.max():,})"
    if not len(fitting):
        return f"packs of {budget:,} tokens: none{words}"
    plan = Plan([fitting], [1.0], budget, 1, DataConfig().lookahead, 1, seed=0)
    packs = sum(len(plan.packs(0, window)) for window in range(plan.windows))
    padding = 1 - int(fitting.sum()) / (packs * budget)
    return f"packs of {budget:,} tokens: {packs:,} an epoch, padding {padding:.2%}{words}"


def verify_shards(folder: str | Path) -> int:
    """Reads every byte, prints a line a fault, and how many there are. The number of faults."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    place = open_folder(folder)
    manifest, faults = read_manifest(place), 0
    columns = (TextColumn("verify"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("verify", total=num_bytes(manifest))
        for fault in verify(place, lambda count: progress.advance(bar, count)):
            faults += 1
            at = "" if fault.offset is None else f" byte {fault.offset}:"
            print(f"{fault.file}:{at} {fault.what}")
    if manifest.codec_settings and (ours := rebuild_codec(manifest).fingerprint) != manifest.codec:
        faults += 1
        print(f"dataset.json: says codec {manifest.codec}, its settings make {ours}")
    clips = sum(counts["clips"] for counts in manifest.splits.values())
    print(f"{clips:,} clips, {num_bytes(manifest):,} bytes: {f'{faults:,} faults' if faults else 'whole'}")
    return faults


def rebuild_codec(manifest: Manifest):
    try:
        return build_codec(CodecConfig(**manifest.codec_settings))
    except TypeError as error:
        raise MegaSoraError(f"the codec of these shards is unknown to this version: {error}") from None


def decode_clip(folder: str | Path, sample_id: int) -> tuple[np.ndarray, dict[str, Any]]:
    """uint8 [F, H, W, 3] at native size, and what is known of the clip: meta.json, its caption, frames shown, split.

    Of a large clip, F are the first frames alone, SHOWN_PIXELS of them at most. Raises MegaSoraError for an id that
    is not there.
    """
    for split in SPLITS:
        shards = Shards.open(folder, split, strict=False)
        places = np.flatnonzero(shards.entries.sample_ids == sample_id)
        if len(places):
            break
    else:
        clips = sum(counts["clips"] for counts in shards.manifest.splits.values())
        raise MegaSoraError(
            f"{folder} has no sample {sample_id}; it has {clips} clips, left out ones keep their number"
        )
    manifest, number = shards.manifest, int(places[0])
    codec = rebuild_codec(manifest)
    if codec.fingerprint != manifest.codec:
        raise MegaSoraError(
            f"{folder} was made with codec {manifest.codec}, its settings here make {codec.fingerprint}"
        )
    record, meta = shards.read(number, lambda caption: torch.zeros(0)), shards.meta(number)
    t, h, w = record.grid
    pt, ph, pw = (f * p for f, p in zip(codec.factors, manifest.patch, strict=True))
    shown = min(t, max(1, SHOWN_PIXELS // (pt * ph * pw * h * w)))
    patches = record.patches_LP[: shown * h * w].float()
    with torch.inference_mode():
        frames = codec.decode(unpatchify(patches, (shown, h, w), tuple(manifest.patch)))
    height, width, count = (int(n) for n in record.native[:3])
    pixels = frames_to_uint8(frames)[:count, :height, :width].numpy()
    facts = {"split": split, "shard": shards.names[shards.shard_of[number]], "tokens": t * h * w}
    return pixels, {"caption": record.caption, **facts, **meta, "frames_shown": len(pixels)}


def preview(frames_FHWC: np.ndarray, count: int = 8, height: int = 160) -> tuple[np.ndarray, int]:
    """At most `count` frames, evenly spaced and scaled down to `height`, and how often to enlarge them to reach it."""
    from PIL import Image

    index = np.unique(np.linspace(0, len(frames_FHWC) - 1, count).round().astype(int))
    frames = frames_FHWC[index]
    high, wide = frames.shape[1:3]
    if high > height:
        size = (max(1, round(wide * height / high)), height)
        frames = np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BOX)) for f in frames])
    return frames, max(1, height // frames.shape[1])
