"""Which blocks of a listing this process ingests, and what the whole ingest is.

Clips [b n, (b + 1) n) are block b, n = `ingest.clips_per_block`. Part i of p takes blocks i, i + p, i + 2p ...: a
block is written by one process, so shards do not depend on how many there are, and everybody knows theirs unasked.
`ingest.json` in the destination says what is being ingested and how; whoever comes later must be about to do the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megasora.config import Config
from megasora.data.blocks import BLOCKS, LOCKS, PARTS
from megasora.errors import MegaSoraError
from megasora.files import locked, write_whole
from megasora.ingest.sources import Source, listing_hash

CHARTER = "ingest.json"
SPOOL = ".spool"
# of [ingest], what changes how fast or where an ingest runs, not what comes out
WITHOUT_EFFECT = ("workers", "memory_mib", "seconds")


@dataclass(frozen=True)
class Part:
    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Part:
        """`1/8` to `8/8`."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise MegaSoraError(f"--part {text} is not I/N with I from 1 to N, e.g. 1/8")
        return cls(int(index) - 1, int(count))

    @classmethod
    def of_environment(cls, variables: Mapping[str, str]) -> Part:
        """As torchrun and Slurm number processes: ranks, tasks of an array, or ranks within each task."""

        def value(name: str, default: int) -> int:
            text = variables.get(name, str(default))
            if not text.isdecimal():
                raise MegaSoraError(f"{name}={text} in the environment is no number; unset it, or give --part")
            return int(text)

        rank, ranks = value("RANK", 0), value("WORLD_SIZE", 1)
        first, step = value("SLURM_ARRAY_TASK_MIN", 0), value("SLURM_ARRAY_TASK_STEP", 1)
        task, tasks = (value("SLURM_ARRAY_TASK_ID", first) - first) // max(1, step), value("SLURM_ARRAY_TASK_COUNT", 1)
        if not (0 <= rank < ranks and 0 <= task < tasks):
            raise MegaSoraError(
                f"RANK={rank} of WORLD_SIZE={ranks}, task {task} of SLURM_ARRAY_TASK_COUNT={tasks}: no such process; "
                "number the tasks of the array without gaps, or give --part"
            )
        return cls(task * ranks + rank, tasks * ranks)

    def blocks(self, num_blocks: int) -> range:
        return range(self.index, num_blocks, self.count)


def charter_of(clips: list[Source], config: Config, codec: str, text: str) -> dict[str, Any]:
    """What all who take part in an ingest must agree on. `codec`, `text`: fingerprints."""
    settings = {key: value for key, value in asdict(config.ingest).items() if key not in WITHOUT_EFFECT}
    return {
        "clips": len(clips), "listing": listing_hash(clips), "codec": codec, "text": text,
        "text.max_tokens": config.text.max_tokens, "data.patch": list(config.data.patch),
        **{f"ingest.{key}": value for key, value in settings.items()},
    }  # fmt: skip


def claim(out: Path, charter: dict[str, Any]) -> bool:
    """Makes `out` the destination of this ingest, or finds that it is; whether it was made now.

    Raises MegaSoraError with every difference, and where `out` holds anything else.
    """
    path = out / CHARTER
    if out.exists() and not out.is_dir():
        raise MegaSoraError(f"{out} exists and is not empty; remove it or give another --out")
    if not path.exists() and out.is_dir() and any(p.name not in (LOCKS, f".{CHARTER}.part") for p in out.iterdir()):
        raise MegaSoraError(f"{out} exists and is not empty; remove it or give another --out")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / LOCKS / "charter", f"{path}", wait=True):
        if not path.exists():
            write_whole(path, json.dumps(charter, indent=2) + "\n")
            return True
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            differences = [
                f"{key}: {theirs.get(key, 'none')} -> {charter.get(key, 'none')}"
                for key in {**theirs, **charter}
                if theirs.get(key) != charter.get(key)
            ]
        except (ValueError, TypeError, AttributeError) as error:
            raise MegaSoraError(f"{path} is damaged: {error}; remove {out} or give another --out") from None
    if differences:
        raise MegaSoraError(
            f"{out} holds another ingest: {'; '.join(differences)}. Go on with its source and settings, or give "
            "another --out"
        )
    return False


def disclaim(out: Path) -> None:
    """Removes what an ingest without a single complete clip has left. `out` was claimed before."""
    for name in (BLOCKS, PARTS, SPOOL, LOCKS):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / CHARTER).unlink(missing_ok=True)


def remove_empty(folders: list[Path]) -> None:
    """Of `folders`, innermost first, those that are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
