"""An ingest, or a part of one: blocks of clips, one after the other, through the pool into shards.

    listing --jobs--> Pool --answers in order--> BlockWriter, a block at a time; behind the last block, the manifest

The children decode and encode ahead over the ends of blocks while this process writes. A block that is complete is
never touched again, one that was under way when a process died is begun anew, and the destination is a dataset when
dataset.json is there: written by whoever completes the last block.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasora.codec import build_codec
from megasora.config import Config
from megasora.data.blocks import BLOCKS, LOCKS, BlockWriter, RawPatches, read_block, write_manifest
from megasora.data.pack import Record
from megasora.data.shards import Manifest
from megasora.errors import MegaSoraError
from megasora.files import locked
from megasora.ingest.division import SPOOL, Part, charter_of, claim, disclaim, remove_empty
from megasora.ingest.pool import Pool
from megasora.ingest.sources import Source, find_clips
from megasora.ingest.summary import print_summary
from megasora.ingest.worker import job_of, settings_of
from megasora.text import build_text_encoder

SHOWN_REJECTIONS = 5  # examples a reason that a block remembers
CAPTIONS_AT_ONCE = 32  # of one block: what is encoded together depends on nothing but the block


def run_ingest(source: Path, out: Path, config: Config, part: Part | None = None) -> Manifest | None:
    """See `megasora.ingest.ingest`."""
    part = part or Part()
    clips = find_clips(source)
    refuse_bare(clips, config)
    codec, encoder = build_codec(config.codec), build_text_encoder(config.text)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    num_blocks = -(-len(clips) // config.ingest.clips_per_block)
    new = False
    try:
        new = claim(out, charter_of(clips, config, codec.fingerprint, encoder.fingerprint))
        ingest_part(clips, num_blocks, out, config, encoder, part)
    except BaseException:
        if new and part.count == 1 and not any((out / BLOCKS).glob("*.json")):  # nobody else's, and nothing to keep
            disclaim(out)
        remove_empty(made)
        raise
    found = [read_block(out, block) for block in range(num_blocks)]
    if left := sum(facts is None for facts in found):
        print(f"part {part} is complete; {left} of {num_blocks} blocks are left to others")
        return None
    if all(facts.first < 0 for facts in found):
        disclaim(out)
        remove_empty(made)
        first = next(text for facts in found for text in facts.details["first"])
        raise MegaSoraError(f"none of the {len(clips)} clips in {source} could be used; the first: {first}")
    shutil.rmtree(out / SPOOL, ignore_errors=True)
    manifest = write_manifest(
        out, codec.fingerprint, encoder.fingerprint, list(config.data.patch), num_blocks, asdict(config.codec)
    )
    print_summary(manifest, len(clips), [facts.details for facts in found])
    return manifest


def refuse_bare(clips: list[Source], config: Config) -> None:
    bare = [clip for clip in clips if not clip.caption and not clip.fault]
    if bare and config.ingest.missing_caption == "error":
        path = bare[0].media.path
        remedy = f"write {path.with_suffix('.txt').name} beside it" if not bare[0].media.name else "give it one"
        raise MegaSoraError(
            f"{bare[0].media} has no caption ({len(bare)} of {len(clips)} clips have none): {remedy}, or set "
            "ingest.missing_caption=skip or =empty"
        )


@contextmanager
def spool_folder(folder: Path) -> Iterator[Path]:
    """Empty at the start, gone at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            folder.parent.rmdir()


@dataclass(frozen=True)
class Prepared:
    """A clip on its way: where its patches will lie and what its caption became; or why it is not to be decoded."""

    number: int
    source: Source
    spool: Path
    text: Tensor | None = None
    rejection: dict[str, str] | None = None


def ingest_part(clips: list[Source], num_blocks: int, out: Path, config: Config, encoder: Any, part: Part) -> None:
    """Every block of this part that is not complete yet."""
    name = f"part-{part.index + 1}-of-{part.count}"
    with locked(out / LOCKS / name, f"part {part} of {out}"), spool_folder(out / SPOOL / name) as spool:
        todo = [block for block in part.blocks(num_blocks) if read_block(out, block) is None]
        if todo:
            ingest_blocks(clips, todo, out, spool, config, encoder, part)


def ingest_blocks(
    clips: list[Source], todo: list[int], out: Path, spool: Path, config: Config, encoder: Any, part: Part
) -> None:
    size = config.ingest.clips_per_block
    numbers = [range(block * size, min((block + 1) * size, len(clips))) for block in todo]
    line: deque[Prepared] = deque()  # handed to the pool and not written yet

    def jobs() -> Iterator[dict[str, Any] | None]:
        for few in (block[i : i + CAPTIONS_AT_ONCE] for block in numbers for i in range(0, size, CAPTIONS_AT_ONCE)):
            for clip in prepare(few, clips, spool, config, encoder):
                line.append(clip)
                yield None if clip.rejection else job_of(clip.source.media, clip.spool)

    encoder.encode([""])  # one that cannot be loaded is an error here, and no caption's fault
    settings = settings_of(config.codec, config.ingest, config.data.patch)
    with (
        Pool(settings, config.ingest.workers or cores()) as pool,
        progress(sum(map(len, numbers)), part) as advance,
    ):
        answers = pool.run(jobs())
        for block, members in zip(todo, numbers, strict=True):
            with BlockWriter(out, block, config.ingest.shard_mib << 20) as writer:
                counts = Counts()
                for _ in members:
                    answer = next(answers)
                    clip = line.popleft()
                    answer = clip.rejection or answer
                    if "reason" in answer:
                        counts.reject(answer)
                    else:
                        counts.kept += 1
                        write_clip(writer, clip, answer, encoder.precomputed)
                    clip.spool.unlink(missing_ok=True)
                    advance()
                writer.commit(counts.reasons, counts.details())


def prepare(numbers: range, clips: list[Source], spool: Path, config: Config, encoder: Any) -> Iterator[Prepared]:
    """A few clips in a row, their captions encoded together, before any frame is read: a clip that its caption rules
    out is not decoded."""
    rejections = {number: rejection_of(clips[number], config) for number in numbers}
    wanted = [number for number in numbers if rejections[number] is None]
    texts = dict(zip(wanted, encode_each(encoder, [clips[number].caption or "" for number in wanted]), strict=True))
    for number in numbers:
        source, rejection, text = clips[number], rejections[number], texts.get(number)
        if isinstance(text, MegaSoraError):
            rejection = ("caption too long", f"{source.media}: {text}")
        elif text is not None and encoder.precomputed and not torch.isfinite(text.half()).all():
            rejection = ("features not finite", f"{source.media}: features of its caption are not finite in float16")
        if rejection:
            reason, message = rejection
            answer = {"stage": "caption", "reason": reason, "message": message}
            yield Prepared(number, source, spool / str(number), rejection=answer)
        else:
            yield Prepared(number, source, spool / str(number), text)


def rejection_of(clip: Source, config: Config) -> tuple[str, str] | None:
    """Reason and message where there is no caption to encode."""
    if clip.fault:
        return "unreadable caption", clip.fault
    if not clip.caption and config.ingest.missing_caption == "skip":
        return "no caption", f"{clip.media} has no caption"
    return None


def encode_each(encoder: Any, captions: list[str]) -> list[Tensor | MegaSoraError]:
    """Of each caption its encoding, or why it has none: an encoder takes all that it is given, or none of it."""
    if not captions:
        return []
    try:
        return encoder.encode(captions)
    except MegaSoraError as error:
        if len(captions) == 1:
            return [error]
    middle = len(captions) // 2
    return encode_each(encoder, captions[:middle]) + encode_each(encoder, captions[middle:])


def write_clip(writer: BlockWriter, clip: Prepared, facts: dict[str, Any], precomputed: bool) -> None:
    t, h, w = facts["grid"]
    record = Record(
        clip.number,
        RawPatches(clip.spool, (t * h * w, facts["width_of_token"])),
        (t, h, w),
        clip.text,
        (float(facts["height"]), float(facts["width"]), float(facts["frames"]), facts["fps"]),
        clip.source.caption or "",
    )
    media = clip.source.media
    meta: dict[str, Any] = {"source": clip.source.name, "sha256": facts["sha256"]}
    if media.excerpt:
        meta |= {"start": media.start, "end": media.end}
    if facts["quality"]:
        meta["quality"] = facts["quality"]
    writer.add(clip.source.split, record, meta, clip.text if precomputed else None)


class Counts:
    """What became of the clips of a block."""

    def __init__(self) -> None:
        self.kept = 0
        self.reasons: Counter[str] = Counter()
        self.stages: dict[str, Counter[str]] = {}
        self.examples: dict[str, list[str]] = {}
        self.first: list[str] = []

    def reject(self, answer: dict[str, str]) -> None:
        reason, message = answer["reason"], answer["message"].encode("utf-8", "replace").decode()
        self.reasons[reason] += 1
        self.stages.setdefault(answer["stage"], Counter())[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < SHOWN_REJECTIONS:
            shown.append(message)
        self.first = self.first or [message]

    def details(self) -> dict[str, Any]:
        stages = {stage: dict(reasons) for stage, reasons in self.stages.items()}
        return {"kept": self.kept, "stages": stages, "examples": self.examples, "first": self.first}


def cores() -> int:
    """Those that this process may use, shared with the other processes of a torchrun on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def progress(total: int, part: Part) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    name = "ingest" if part.count == 1 else f"ingest {part}"
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total)
        yield lambda: bar.advance(task)
