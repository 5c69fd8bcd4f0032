"""`megasora ingest`: a folder of clips and captions to shards.

    file --read_clip--> frames --codec--> latents --patchify--> patches --> shards

Clips below a folder named `val` directly under the source are the held-out split; all others are trained on. Everything
is written to a folder beside the destination and renamed at the end: it is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch

from megasora.codec import build_codec
from megasora.config import Config
from megasora.data.pack import Record
from megasora.data.patches import frames_to_float, pad_frames, patchify
from megasora.data.shards import MANIFEST, SPLITS, Manifest, ShardWriter
from megasora.data.video import RejectedClip, is_clip, read_clip
from megasora.errors import MegaSoraError
from megasora.text import build_text_encoder

SHOWN_REJECTIONS = 5  # examples a reason


@dataclass(frozen=True)
class Source:
    path: Path
    split: str
    caption: str | None


def find_clips(source: Path) -> list[Source]:
    """Every clip below `source` in the order of its path, which makes its number its permanent sample id.

    Its caption is NAME.txt, the key `caption` of NAME.json, or a line {"file": ..., "caption": ...} of a captions.jsonl
    in the same folder or above it.
    """
    if not source.is_dir():
        raise MegaSoraError(f"{source} is not a folder; give the folder that holds the clips")
    tables: dict[Path, dict[str, str]] = {}
    for table in source.rglob("captions.jsonl"):
        for number, line in enumerate(read_text(table).split("\n"), 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                tables.setdefault(table.parent, {})[values["file"]] = one_line(values["caption"])
            except (ValueError, KeyError, TypeError):
                raise MegaSoraError(f'{table}:{number} is not {{"file": "NAME.mp4", "caption": "..."}}') from None
    paths = sorted(p for p in source.rglob("*") if is_clip(p) and p.is_file() and not p.name.startswith("."))
    if not paths:
        raise MegaSoraError(f"no clip in {source}: looked for .mp4 .mov .mkv .webm .avi .png .jpg .webp files")
    found = []
    for path in paths:
        split = "val" if path.relative_to(source).parts[0] == "val" else "train"
        found.append(Source(path, split, find_caption(path, source, tables)))
    return found


def find_caption(path: Path, source: Path, tables: dict[Path, dict[str, str]]) -> str | None:
    text, meta = path.with_suffix(".txt"), path.with_suffix(".json")
    if text.is_file():
        return one_line(read_text(text))
    if meta.is_file():
        try:
            return one_line(json.loads(read_text(meta))["caption"])
        except (ValueError, KeyError, TypeError):
            raise MegaSoraError(f'{meta} is not JSON with a text under the key "caption"') from None
    for folder in (path.parent, *path.parents):
        table = tables.get(folder, {})
        caption = table.get(path.relative_to(folder).as_posix())
        if caption is not None or folder == source:
            return caption
    return None


def read_text(path: Path) -> str:
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


def ingest(source: Path, out: Path, config: Config) -> Manifest:
    """Reads `source`, writes `out`, prints a summary. Raises MegaSoraError; then nothing is left of `out`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MegaSoraError(f"{out} exists and is not empty; remove it or give another --out")
    clips = find_clips(source)
    bare = [clip.path for clip in clips if not clip.caption]
    if bare and config.ingest.missing_caption == "error":
        raise MegaSoraError(
            f"{bare[0]} has no caption ({len(bare)} of {len(clips)} clips have none): write "
            f"{bare[0].with_suffix('.txt').name} beside it, or set ingest.missing_caption=skip or =empty"
        )
    out = out.resolve()
    partial = out.with_name(f".{out.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    new = [folder for folder in out.parents if not folder.exists()]
    try:
        partial.mkdir(parents=True)
        manifest, examples = write_shards(clips, partial, config, source)
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in new:
            with suppress(OSError):
                folder.rmdir()
        raise
    print_summary(manifest, examples)
    return manifest


def write_shards(
    clips: list[Source], folder: Path, config: Config, source: Path
) -> tuple[Manifest, dict[str, list[str]]]:
    """The manifest, and for each reason of rejection its messages."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    codec, encoder = build_codec(config.codec), build_text_encoder(config.text)
    writers = {split: ShardWriter(folder, split, config.ingest.shard_mib << 20) for split in SPLITS}
    rejected: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    patch_dim = text_dim = 0

    def prepare(number: int, clip: Source) -> tuple[Record, torch.Tensor | None]:
        caption = clip.caption
        if not caption:
            if config.ingest.missing_caption == "skip":
                raise RejectedClip("no caption", f"{clip.path} has no caption")
            caption = ""
        video = read_clip(clip.path, config.ingest)
        frames = frames_to_float(torch.from_numpy(video.frames_FHWC))
        _, ph, pw = (f * p for f, p in zip(codec.factors, config.data.patch, strict=True))
        patches, grid = patchify(codec.encode(pad_frames(frames, (ph, pw))), tuple(config.data.patch))
        count, height, width = video.frames_FHWC.shape[:3]
        try:
            text = encoder.encode([caption])[0]
        except MegaSoraError as error:
            raise RejectedClip("caption too long", f"{clip.path}: {error}") from None
        record = Record(number, patches, grid, text, (float(height), float(width), float(count), video.fps), caption)
        return record, text if encoder.precomputed else None

    columns = (TextColumn("ingest"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    threads = config.ingest.threads or os.cpu_count() or 1
    console = Console(stderr=True)
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        closing(in_order(prepare, clips, threads)) as results,
        ExitStack() as stack,
    ):
        for writer in writers.values():
            stack.callback(writer.drop)
        bar = progress.add_task("ingest", total=len(clips))
        for clip, future in results:
            try:
                record, features = future.result()
                writers[clip.split].add(record, clip.path.relative_to(source).as_posix(), features)
                patch_dim = record.patches_LP.shape[1]
                text_dim = features.shape[1] if features is not None else 0
            except RejectedClip as error:
                rejected[error.reason] += 1
                examples.setdefault(error.reason, []).append(str(error))
            progress.advance(bar)
        for writer in writers.values():
            writer.close()
    if not any(w.counts["clips"] for w in writers.values()):
        first = next(iter(examples.values()))[0]
        raise MegaSoraError(f"none of the {len(clips)} clips in {source} could be used; the first: {first}")
    splits = {s: {**w.counts, "shards": w.shards} for s, w in writers.items()}
    manifest = Manifest(
        codec.fingerprint, encoder.fingerprint, list(config.data.patch), patch_dim, splits, dict(rejected), text_dim
    )
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    return manifest, examples


def in_order(work, clips: list[Source], threads: int) -> Iterator[tuple[Source, Future]]:
    """Runs `work(number, clip)` on threads, a few clips ahead, and gives the results in the order of the clips."""
    with ThreadPoolExecutor(threads) as pool:
        line = enumerate(clips)
        pending = deque((clip, pool.submit(work, i, clip)) for i, clip in islice(line, 2 * threads))
        try:
            while pending:
                yield pending.popleft()
                for i, clip in islice(line, 1):
                    pending.append((clip, pool.submit(work, i, clip)))
        finally:
            for _, future in pending:
                future.cancel()


def print_summary(manifest: Manifest, examples: dict[str, list[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("split", "clips", "of these images", "frames", "tokens", "longest clip, tokens", "shards")
    for split, counts in manifest.splits.items():
        numbers = [f"{counts[k]:,}" for k in ("clips", "images", "frames", "tokens", "longest")]
        table.add_row(split, *numbers, str(len(counts["shards"])))
    console = Console()
    console.print(table)
    if manifest.rejected:
        table = Table("rejected because", "clips", "for example")
        for reason, count in sorted(manifest.rejected.items(), key=lambda item: -item[1]):
            shown = "\n".join(examples[reason][:SHOWN_REJECTIONS]).encode("utf-8", "replace").decode()
            table.add_row(reason, str(count), escape(shown))
        console.print(table)
