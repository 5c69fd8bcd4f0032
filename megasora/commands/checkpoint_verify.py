"""`megasora checkpoint verify`: reads every byte of the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megasora.checkpoint.damage import DamagedCheckpoint
from megasora.checkpoint.manifest import read_manifest
from megasora.checkpoint.verify import verify_checkpoint
from megasora.commands.checkpoint_source import complete
from megasora.errors import MegaSoraError, printable
from megasora.formats.recognize import check_format
from megasora.observe.byte_progress import byte_progress

MAX_THREADS = 256


def verify_checkpoints(path: Path, threads: int = 0) -> int:
    """Prints a line per checkpoint of a run folder, or for the checkpoint `path`; returns how many are not whole.

    Every byte is read, nothing is changed. `threads`: that read; 0: one per core. Raises MegaSoraError if there is no
    checkpoint.
    """
    found = check_format(path, "run", "checkpoint")
    if not 0 <= threads <= MAX_THREADS:
        raise MegaSoraError(f"--threads {threads} must be from 0 to {MAX_THREADS}")
    checkpoints = [path] if found.format == "checkpoint" else complete(path)
    verdicts = {}
    with byte_progress("verify", sum(map(num_bytes, checkpoints))) as advance:
        for checkpoint in checkpoints:
            verdicts[checkpoint] = is_whole, text = verify_one(checkpoint, threads, advance)
            print(printable(f"{checkpoint.name}  {text}"), flush=True)
    return sum(not is_whole for is_whole, _ in verdicts.values())


def verify_one(checkpoint: Path, threads: int, advance: Callable[[int], None]) -> tuple[bool, str]:
    """(whether it is whole, what to print)."""
    try:
        files = verify_checkpoint(checkpoint, threads, advance).files
        return True, f"whole: {len(files)} files, {sum(size for size, _ in files.values()):,} bytes"
    except DamagedCheckpoint as error:
        return False, error.problem
    except MegaSoraError as error:  # of another version
        return False, str(error)


def num_bytes(checkpoint: Path) -> int:
    """That the manifest names; 0 if it cannot be read."""
    try:
        return sum(size for size, _ in read_manifest(checkpoint).files.values())
    except MegaSoraError:
        return 0
