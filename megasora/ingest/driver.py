"""Runs an ingest, or one part of it.

    listing --jobs--> WorkerPool --results in order--> BlockWriter, one block at a time; then the manifest

Workers decode and encode ahead across block boundaries while this process writes. A complete block is never written
again; a block that was incomplete when a process died is written from its start. `dataset.json` appears when all blocks
are complete, written by the process that completes the last one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasora.codec import codec_fingerprint, resolve_codec
from megasora.config import CodecConfig, Config
from megasora.data.manifest_writer import read_block, write_manifest
from megasora.data.pack import Record
from megasora.data.shard_format import Manifest
from megasora.data.shard_writer import BLOCK_DIR, LOCK_DIR, BlockWriter, PatchFile
from megasora.errors import MegaSoraError
from megasora.ingest.caption_encoding import PreparedClip, check_captions, prepare_block
from megasora.ingest.codec_pool import CodecPool, codec_environments
from megasora.ingest.library_warnings import LibraryWarnings, python_warnings_to
from megasora.ingest.listing import ClipSource, Listing
from megasora.ingest.output_folder import (
    PATCH_DIR,
    claim_output,
    discard_output,
    ingest_spec,
    remove_empty_folders,
    temporary_patch_dir,
    write_report,
)
from megasora.ingest.parts import Part
from megasora.ingest.pool import WorkerPool
from megasora.ingest.results import EncodedClip, Rejection
from megasora.ingest.sources import find_clips
from megasora.ingest.summary import Rejections, build_report, merge_warnings, print_summary
from megasora.ingest.worker import encode_job, worker_settings
from megasora.locks import locked
from megasora.text import build_text_encoder

if TYPE_CHECKING:
    from megasora.ingest.caption_encoding import TextEncoder


def run_ingest(source: Path, out: Path, config: Config, part: Part | None = None) -> Manifest | None:
    """Writes the blocks of one part, and the manifest if all blocks are complete.

    Arguments and errors: `megasora.ingest.ingest`.
    """
    part = part or Part()
    config = replace(config, codec=with_absolute_path(resolve_codec(config.codec)))
    listing = find_clips(source)
    clips, printed = listing.clips, LibraryWarnings()
    check_captions(clips, config)
    codec, encoder = codec_fingerprint(config.codec), build_text_encoder(config.text)
    new_folders = [folder for folder in (out, *out.parents) if not folder.exists()]
    num_blocks = -(-len(clips) // config.ingest.clips_per_block)
    is_new = False
    try:
        is_new = claim_output(out, ingest_spec(clips, config, codec, encoder.fingerprint))
        ingest_part(clips, num_blocks, out, config, codec, encoder, part, printed)
    except BaseException:
        if is_new and part.count == 1 and not any((out / BLOCK_DIR).glob("*.json")):  # no other part, no complete block
            discard_output(out)
        remove_empty_folders(new_folders)
        raise
    blocks = [read_block(out, block) for block in range(num_blocks)]
    if missing := sum(block is None for block in blocks):
        remaining = f"{missing} of {num_blocks} blocks {'is' if missing == 1 else 'are'} missing"
        print(f"part {part} has nothing left to do; {remaining}: run the other parts")
        return None
    if all(block.is_empty for block in blocks):
        discard_output(out)
        remove_empty_folders(new_folders)
        first = blocks[0].details["first_rejection"]
        raise MegaSoraError(f"none of the {len(clips)} clips in {source} could be used; the first: {first}")
    shutil.rmtree(out / PATCH_DIR, ignore_errors=True)
    manifest = write_manifest(
        out, codec, encoder.fingerprint, list(config.data.patch), num_blocks, codec_settings(config.codec)
    )
    finish(out, listing, manifest, [block.details for block in blocks], printed)
    return manifest


def finish(
    out: Path, listing: Listing, manifest: Manifest, details: list[dict[str, Any]], printed: LibraryWarnings
) -> None:
    """Adds the counts of files, clips and warnings to ingest.json, and prints them. `details`: of each block."""
    merge_warnings(printed, details)
    write_report(out, build_report(listing, manifest, printed))
    print_summary(manifest, listing, details, printed)


def ingest_part(
    clips: list[ClipSource],
    num_blocks: int,
    out: Path,
    config: Config,
    codec: str,
    encoder: TextEncoder,
    part: Part,
    printed: LibraryWarnings,
) -> None:
    """Writes every block of this part that is not complete yet; counts the warnings of this process in `printed`.

    `codec`: its fingerprint.
    """
    name = f"part-{part.index + 1}-of-{part.count}"
    with (
        locked(out / LOCK_DIR / name, f"part {part} of {out}"),
        temporary_patch_dir(out / PATCH_DIR / name) as patch_dir,
    ):
        incomplete = [block for block in part.blocks(num_blocks) if read_block(out, block) is None]
        if incomplete:
            # fails here if the encoder cannot be loaded; encode_captions would reject the captions instead
            encoder.encode([""])
            with python_warnings_to(printed.add), open_pool(config, codec, printed.add) as pool:
                ingest_blocks(clips, incomplete, out, patch_dir, config, encoder, pool, part)


def with_absolute_path(codec: CodecConfig) -> CodecConfig:
    """`codec` with a path that holds from any folder, for the manifest. A path that is no file is a hub name."""
    return replace(codec, path=str(Path(codec.path).absolute())) if codec.path and Path(codec.path).exists() else codec


def codec_settings(codec: CodecConfig) -> dict[str, Any]:
    """The settings for the manifest: those that change latents, and where the weights are."""
    keys = ("name", "factors", "channels", *(("path", "tile", "tile_overlap") if codec.path else ()))
    return {key: getattr(codec, key) for key in keys}


@contextmanager
def open_pool(config: Config, codec: str, receive: Callable[[str], None]) -> Iterator[WorkerPool]:
    """The decode workers, and the codec processes of a codec that has weights.

    `codec`: its fingerprint; `receive`: called with what codec processes print.
    """
    settings = worker_settings(config.codec, config.ingest, config.data.patch)
    num_workers = config.ingest.workers or num_cores()
    with ExitStack() as stack:
        codecs = None
        if config.codec.path:
            environments = codec_environments(config.codec, config.ingest, min(num_workers, num_cores()))
            codecs = stack.enter_context(CodecPool(config.codec, config.ingest, codec, environments, receive))
        yield stack.enter_context(WorkerPool(settings, num_workers, codecs))


def ingest_blocks(
    clips: list[ClipSource],
    blocks: list[int],
    out: Path,
    patch_dir: Path,
    config: Config,
    encoder: TextEncoder,
    pool: WorkerPool,
    part: Part,
) -> None:
    size = config.ingest.clips_per_block
    sample_ids = {block: range(block * size, min((block + 1) * size, len(clips))) for block in blocks}

    def jobs() -> Iterator[tuple[PreparedClip, dict[str, Any] | Rejection]]:
        for ids in sample_ids.values():
            for clip in prepare_block(ids, clips, patch_dir, config, encoder):
                yield clip, clip.rejection or encode_job(clip.source.media, clip.patch_path)

    with progress_bar(sum(map(len, sample_ids.values())), part) as advance:
        results = pool.run(jobs())
        for block, ids in sample_ids.items():
            with BlockWriter(out, block, config.ingest.shard_mib << 20) as writer:
                write_block(writer, islice(results, len(ids)), encoder.precomputed, advance)


def write_block(
    writer: BlockWriter,
    results: Iterable[tuple[PreparedClip, EncodedClip | Rejection, dict[str, list[Any]]]],
    precomputed: bool,
    advance: Callable[[], None],
) -> None:
    """Writes the clips of one block, counts those that were rejected, and commits the block.

    `results`: of the jobs of its clips, with what libraries printed; `precomputed`: store text features; `advance`:
    called for each clip.
    """
    rejections, printed = Rejections(), LibraryWarnings()
    for clip, result, printed_details in results:
        printed.update(printed_details)
        if isinstance(result, Rejection):
            rejections.add(result)
        else:
            write_record(writer, clip, result, precomputed)
        clip.patch_path.unlink(missing_ok=True)
        advance()
    warnings = {"warnings": printed.details()} if printed.kinds else {}
    writer.commit(rejections.reasons, rejections.details() | warnings)


def write_record(writer: BlockWriter, clip: PreparedClip, result: EncodedClip, precomputed: bool) -> None:
    t, h, w = result.grid
    record = Record(
        clip.sample_id,
        PatchFile(clip.patch_path, (t * h * w, result.patch_dim)),
        (t, h, w),
        clip.text,
        (float(result.height), float(result.width), float(result.frames), result.fps),
        clip.source.caption or "",
    )
    media = clip.source.media
    meta: dict[str, Any] = {"source": clip.source.name, "sha256": result.sha256}
    if media.is_excerpt:
        meta |= {"start": media.start, "end": media.end}
    if result.quality:
        meta["quality"] = result.quality
    writer.add(clip.source.split, record, meta, clip.text if precomputed else None)


def num_cores() -> int:
    """Cores that this process may use, shared with the other processes of a torchrun on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def progress_bar(total: int, part: Part) -> Iterator[Callable[[], None]]:
    """A bar on a terminal's standard error; yields a function that advances it by one clip."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    name = "ingest" if part.count == 1 else f"ingest {part}"
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total)
        yield lambda: bar.advance(task)
