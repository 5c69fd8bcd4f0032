"""`megasora checkpoint reshape`: the same checkpoint in another number of files, bit for bit the same values."""

from __future__ import annotations

from pathlib import Path

from megasora.checkpoint.full_tensors import save_full_tensors
from megasora.checkpoint.manifest import read_manifest
from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.store import read_state
from megasora.commands.checkpoint_source import config_of, num_bytes, with_newest
from megasora.commands.run_folder import new_run
from megasora.errors import MegaSoraError
from megasora.observe.byte_progress import byte_progress


def reshape(place: Path, files: int, out: Path) -> None:
    """Writes the run folder `out` with the checkpoint at `place` in `files` files of about equal size."""
    print(with_newest(place, lambda folder: rewrite(folder, files, out)))


def rewrite(folder: Path, files: int, out: Path) -> str:
    """A sentence about what was written."""
    sharded, state, step = ShardedCheckpoint(folder), read_state(folder), read_manifest(folder).step
    shapes, kinds = sharded.shapes, list(sharded.index.kinds)
    if not 1 <= files <= len(shapes):
        raise MegaSoraError(f"--processes {files} must be from 1 to {len(shapes):,}, the number of tensors")
    kept = {key: value for key, value in state.items() if key != "step"}
    with byte_progress("reshape", num_bytes(shapes, len(kinds))) as advance:
        with new_run(out, config_of(folder, state), folder) as store:
            made = save_full_tensors(store, step, shapes, kinds, sharded.full_tensor, kept, advance, files)
    return f"{made.name} of {folder.parent.parent} in {files} files in {out}; a run goes on from it with run.dir={out}"
