"""`megasora shards DIR`: counts and lengths of the clips in a folder of shards, damage, and decoded clips."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megasora.codec import build_codec, codec_fingerprint
from megasora.config import CodecConfig, DataConfig
from megasora.config.validate import check_bounds, validate_codec
from megasora.data.folder import open_folder
from megasora.data.patches import frames_to_uint8, unpatchify
from megasora.data.shard_format import SPLITS, Manifest, read_manifest
from megasora.data.shard_reader import ShardSplit
from megasora.data.verify import num_bytes, verify
from megasora.errors import MegaSoraError, printable
from megasora.observe.byte_progress import byte_progress

if TYPE_CHECKING:
    from megasora.codec import Codec

HISTOGRAM_BINS = 12
MAX_DECODED_PIXELS = 1 << 25  # over all frames of a clip: 16 frames of 1080p


def describe_shards(folder: str | Path, tokens_per_pack: int | None = None) -> None:
    """Prints counts, sizes and a histogram, and the padding in packs of `tokens_per_pack` tokens if it is given."""
    from rich.console import Console
    from rich.markup import escape

    shards_folder = open_folder(folder)
    console, manifest = Console(), read_manifest(shards_folder)
    codec, text = printable(manifest.codec_fingerprint), printable(manifest.text_fingerprint)
    console.print(
        f"codec {escape(codec)}   text {escape(text)}   "
        f"patch {escape(str(manifest.patch))}   patches {manifest.dtype}   format {manifest.format}"
    )
    console.print(build_split_table(manifest, shards_folder.sizes(manifest.file_names())))
    if manifest.rejected:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest.rejected.items())
        console.print(f"left out: {escape(printable(reasons))}")
    tokens = ShardSplit.open(folder, "train", strict=False).index.token_counts
    if tokens_per_pack is not None:
        print(expected_padding(tokens, tokens_per_pack))
    if len(tokens):
        console.print("tokens per clip, train split")
        for bar in histogram_bars(tokens):
            console.print(bar)


def build_split_table(manifest: Manifest, sizes: dict[str, int]):
    """A table for rich. `sizes`: bytes of each file."""
    from rich.table import Table

    table = Table("split", "clips", "of these images", "frames", "tokens", "longest clip, tokens", "shards", "MiB")
    for split, counts in manifest.splits.items():
        mib = sum(sizes.get(name, 0) for name in counts["shards"]) / 2**20
        cells = [f"{counts[key]:,}" for key in ("clips", "images", "frames", "tokens", "max_tokens")]
        table.add_row(split, *cells, str(len(counts["shards"])), f"{mib:,.1f}")
    return table


def histogram_bars(tokens: np.ndarray) -> list[str]:
    """Lines of a histogram with logarithmic bins. `tokens`: int [N], tokens of each clip, not empty."""
    edges = np.unique(np.geomspace(tokens.min(), tokens.max() + 1, HISTOGRAM_BINS + 1).round().astype(int))
    counts, edges = np.histogram(tokens, edges if len(edges) > 1 else 1)
    return [
        f"{int(low):>9,} ..{int(high) - 1:>9,} {count:>9,} {'█' * round(40 * count / counts.max())}"
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
    ]


def expected_padding(tokens: np.ndarray, tokens_per_pack: int) -> str:
    """One line on the padding of an epoch, packed as in a run with the default data.packing_window.

    `tokens`: int [N], tokens of each clip.
    """
    from megasora.data.packing_plan import PackingPlan

    if tokens_per_pack < 1:
        raise MegaSoraError(f"--tokens-per-pack {tokens_per_pack} must be at least 1 token")
    fitting = tokens[tokens <= tokens_per_pack]
    too_long = len(tokens) - len(fitting)
    note = f"; longer clips, left out here: {too_long:,} (the longest has {tokens.max():,})" if too_long else ""
    if not len(fitting):
        return f"packs of {tokens_per_pack:,} tokens: none{note}"
    plan = PackingPlan([fitting], [1.0], tokens_per_pack, 1, DataConfig().packing_window, 1, seed=0)
    packs = sum(len(plan.pack_window(0, window)) for window in range(plan.num_windows))
    padding = 1 - int(fitting.sum()) / (packs * tokens_per_pack)
    return f"packs of {tokens_per_pack:,} tokens: {packs:,} per epoch, padding {padding:.2%}{note}"


def verify_shards(folder: str | Path) -> int:
    """Reads every byte, prints one line per fault and their number; returns the number of faults."""
    shards_folder = open_folder(folder)
    manifest, faults = read_manifest(shards_folder), 0
    with byte_progress("verify", num_bytes(manifest)) as advance:
        for fault in verify(shards_folder, advance):
            faults += 1
            offset = "" if fault.offset is None else f" byte {fault.offset}:"
            print(printable(f"{fault.file}:{offset} {fault.problem}"))
    if manifest.codec_settings:
        config = codec_config(manifest)
        try:
            rebuilt = codec_fingerprint(config)
            if rebuilt != manifest.codec_fingerprint:
                faults += 1
                print(printable(f"dataset.json: says codec {manifest.codec_fingerprint}, its settings make {rebuilt}"))
        except MegaSoraError as error:
            if not config.path:
                raise
            print(printable(f"not compared with its codec, {manifest.codec_fingerprint}: {error}"))
    clips = sum(counts["clips"] for counts in manifest.splits.values())
    result = {0: "no faults", 1: "1 fault"}.get(faults, f"{faults:,} faults")
    print(f"{clips:,} clips, {num_bytes(manifest):,} bytes: {result}")
    return faults


def rebuild_codec(manifest: Manifest) -> Codec:
    """The codec that made the shards. Raises MegaSoraError if it is not there, or unknown to this version."""
    try:
        return build_codec(codec_config(manifest))
    except MegaSoraError as error:
        raise MegaSoraError(f"the codec of these shards, {manifest.codec_fingerprint}: {error}") from None


def codec_config(manifest: Manifest) -> CodecConfig:
    """The settings of the codec that made the shards. Raises MegaSoraError if this version does not know them."""
    try:
        config = CodecConfig(**manifest.codec_settings)
        check_bounds(config)
        validate_codec(config)
        return config
    except (TypeError, ValueError, MegaSoraError) as error:
        raise MegaSoraError(f"the codec of these shards is unknown to this version: {error}") from None


def find_clip(folder: str | Path, sample_id: int) -> tuple[ShardSplit, int]:
    """The split that has a sample, and the sample's index in it. Raises MegaSoraError for an unknown id."""
    for split in SPLITS:
        shards = ShardSplit.open(folder, split, strict=False)
        matches = np.flatnonzero(shards.index.sample_ids == sample_id)
        if len(matches):
            return shards, int(matches[0])
    clips = sum(counts["clips"] for counts in shards.manifest.splits.values())
    raise MegaSoraError(f"{folder} has no sample {sample_id}; it has {clips} clips, and rejected clips keep their ids")


def decode_clip(folder: str | Path, sample_id: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Pixels of a clip, uint8 [F, H, W, 3] at native size, and what is known of it.

    Of a large clip only the first frames are decoded, of at most MAX_DECODED_PIXELS pixels. The dict has the caption,
    the split, the shard, the number of tokens, meta.json, and `frames_shown`. Raises MegaSoraError for an unknown id.
    """
    shards, index = find_clip(folder, sample_id)
    manifest, codec = shards.manifest, rebuild_codec(shards.manifest)
    if codec.fingerprint != manifest.codec_fingerprint:
        raise MegaSoraError(
            f"{folder} was made with codec {manifest.codec_fingerprint}, its settings here make {codec.fingerprint}"
        )
    record, meta = shards.read(index, lambda caption: torch.zeros(0)), shards.read_meta(index)
    t, h, w = record.grid
    pt, ph, pw = (f * p for f, p in zip(codec.factors, manifest.patch, strict=True))
    decoded = min(t, max(1, MAX_DECODED_PIXELS // (pt * ph * pw * h * w)))
    patches = record.patches_LP[: decoded * h * w].float()
    with torch.inference_mode():
        frames = codec.decode(unpatchify(patches, (decoded, h, w), tuple(manifest.patch)))
    height, width, count = (int(n) for n in record.native_size[:3])
    pixels = frames_to_uint8(frames)[:count, :height, :width].numpy()
    location = {"split": shards.split, "shard": shards.names[shards.shard_of[index]], "tokens": t * h * w}
    return pixels, {"caption": record.caption, **location, **meta, "frames_shown": len(pixels)}


def preview(frames_FHWC: np.ndarray, count: int = 8, height: int = 160) -> tuple[np.ndarray, int]:
    """At most `count` frames, evenly spaced and scaled down to `height`, and the factor that enlarges them to it."""
    from PIL import Image

    index = np.unique(np.linspace(0, len(frames_FHWC) - 1, count).round().astype(int))
    frames = frames_FHWC[index]
    native_height, native_width = frames.shape[1:3]
    if native_height > height:
        size = (max(1, round(native_width * height / native_height)), height)
        frames = np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BOX)) for f in frames])
    return frames, max(1, height // frames.shape[1])
