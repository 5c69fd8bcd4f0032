"""Loads a run: chooses a checkpoint and reads the values of this rank's fragments from it.

resume    main process: chooses a checkpoint (start.py)
          one rank of each node: reads manifest, state.json and headers, for all ranks of the node
          all ranks: read the blocks that have their fragments, verified

All ranks load the same checkpoint: each node compares what it sees with what the main process sees. If any rank finds
it damaged, the main process sets it aside and chooses again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megasora.checkpoint.damage import DamagedCheckpoint
from megasora.checkpoint.history import HISTORY, History, read_history, write_history
from megasora.checkpoint.manifest import describe, read_manifest
from megasora.checkpoint.ranks import Ranks, on_main
from megasora.checkpoint.sharded import CheckpointIndex, ShardedCheckpoint, read_index
from megasora.checkpoint.start import Start, choose_start
from megasora.checkpoint.store import DAMAGED, CheckpointStore, names, read_state, remove_incomplete
from megasora.errors import MegaSoraError
from megasora.fragment import Fragment

MAX_SHOWN = 4  # checkpoints in a message


@dataclass(frozen=True)
class View:
    """What a node sees of the checkpoints."""

    names: list[str]
    newest_digest: str  # of the newest one's manifest; empty if there is none, or if it cannot be read

    def agrees_with(self, other: View) -> bool:
        """A manifest that only one of them can read is damage, which is found when the checkpoint is loaded."""
        digests = {self.newest_digest, other.newest_digest} - {""}
        return self.names == other.names and len(digests) < 2

    def __str__(self) -> str:
        shown = ", ".join(self.names[-MAX_SHOWN:]) or "no checkpoint"
        return f"{shown} (manifest {self.newest_digest[:8]})" if self.newest_digest else shown


class Opened(NamedTuple):
    """What one rank of a node has read of a checkpoint, or a problem, and whether that is damage."""

    state: dict[str, Any] | None = None
    index: CheckpointIndex | None = None
    problem: str = ""
    is_damage: bool = False


class CheckpointLoader:
    """Loads the checkpoints of a run, as one rank sees them. Call `resume` and `load` on all ranks.

    `fragments`: all of this rank, with live values. `optional_kinds`: of values that a checkpoint may lack; they then
    stay as they are. `kinds`: those that the loaded checkpoint has.
    """

    def __init__(
        self,
        store: CheckpointStore,
        fragments: list[Fragment],
        ranks: Ranks,
        optional_kinds: frozenset[str] = frozenset(),
        heartbeat: Callable[[str], None] = lambda activity: None,
    ):
        self.store, self.fragments, self.ranks, self.heartbeat = store, fragments, ranks, heartbeat
        self.optional_kinds, self.kinds = optional_kinds, frozenset[str]()

    def resume(self, start: str) -> dict[str, Any] | None:
        """Loads the checkpoint that `run.start=start` asks for into the fragments; returns its state with `step`, or
        None for step 0.

        Raises MegaSoraError on all ranks if the start is not certain, see `choose_start`, or a checkpoint does not fit.
        """
        self.check_same_view()
        while True:
            self.heartbeat("choosing a checkpoint")
            chosen, digest = on_main(self.ranks, lambda: self.choose(start))
            state, damage = None, ""
            if chosen.checkpoint is not None:
                state, damage = self.load(chosen.checkpoint.name, digest)
            if not damage:
                on_main(self.ranks, lambda c=chosen: self.finish(c, start))
                return state
            if chosen.is_exact:
                raise MegaSoraError(f"run.start={start}: {damage}; resume from another one, e.g. run.start=resume")
            on_main(self.ranks, lambda c=chosen, text=damage: self.set_aside(c.checkpoint, text))

    def choose(self, start: str) -> tuple[Start, str]:
        """On the main process: the start and the digest of the chosen manifest; sets aside what is damaged."""
        chosen = choose_start(self.store, start)
        for checkpoint, problem in chosen.damaged:
            self.set_aside(checkpoint, problem)
        for note in chosen.notes:
            print_line(note)
        if chosen.checkpoint is None:
            return chosen, ""
        return chosen, read_manifest(chosen.checkpoint).digest

    def load(self, name: str, digest: str) -> tuple[dict[str, Any] | None, str]:
        """Loads checkpoint `name` on all ranks; returns its state and "", or None and what is damaged on some rank.

        `digest`: of its manifest on the main process. Raises MegaSoraError on all ranks for another problem.
        """
        opened = self.ranks.share_on_node(lambda: self.open(name, digest))
        problem, is_damage = opened.problem, opened.is_damage
        if opened.index is not None:
            problem, is_damage = self.read_fragments(name, opened.index)
        problem, is_damage = self.agree(problem, is_damage)
        if problem and not is_damage:
            raise MegaSoraError(problem)
        return (None, problem) if problem else (opened.state, "")

    def open(self, name: str, digest: str) -> Opened:
        """Reads manifest, state and headers, on one rank of each node."""
        checkpoint = self.store.folder / name
        self.heartbeat(f"opening {name}")
        try:
            manifest = read_manifest(checkpoint)
            if manifest.digest != digest:
                raise MegaSoraError(
                    f"process {self.ranks.rank} sees another {checkpoint} than process 0 (digest of the manifest "
                    f"{manifest.digest[:8]}, {digest[:8]} there); run.dir must be the same folder on all machines"
                )
            return Opened(read_state(checkpoint, manifest), read_index(checkpoint, manifest))
        except DamagedCheckpoint as error:
            return Opened(problem=error.problem, is_damage=True)
        except OSError as error:
            return Opened(problem=f"{error.filename or checkpoint} cannot be read: {describe(error)}", is_damage=True)
        except MegaSoraError as error:
            return Opened(problem=str(error))

    def read_fragments(self, name: str, index: CheckpointIndex) -> tuple[str, bool]:
        """Reads the values of this rank's fragments; returns (problem of this rank or empty, whether it is damage)."""
        self.kinds = frozenset(index.kinds)
        left_out = self.optional_kinds - self.kinds
        wanted = [
            dataclasses.replace(f, values={kind: x for kind, x in f.values.items() if kind not in left_out})
            for f in self.fragments
        ]
        checkpoint = self.store.folder / name
        try:
            ShardedCheckpoint(checkpoint, index).load_into(wanted, lambda size: self.heartbeat(f"loading {name}"))
        except DamagedCheckpoint as error:
            return error.problem, True
        except OSError as error:
            return f"{error.filename or checkpoint} cannot be read: {describe(error)}", True
        except MegaSoraError as error:
            return str(error), False
        return "", False

    def finish(self, chosen: Start, start: str) -> None:
        """On the main process, after all ranks have loaded: the chosen checkpoint is the newest of the run from now."""
        self.store.folder.mkdir(parents=True, exist_ok=True)
        remove_incomplete(self.store.folder)
        (self.store.run_dir / f".{HISTORY}.part").unlink(missing_ok=True)
        if chosen.checkpoint is None:
            return
        renamed = self.store.make_newest(chosen.checkpoint)
        if renamed:
            print_line(f"resuming from {chosen.checkpoint.name}; later checkpoints are now {', '.join(names(renamed))}")
        history = read_history(self.store.run_dir)
        new = History(start if chosen.is_exact else history.start, names(self.store.complete()))
        if new != history:
            write_history(self.store.run_dir, new)

    def set_aside(self, checkpoint: Path, problem: str) -> None:
        renamed = self.store.set_aside(checkpoint, DAMAGED)
        print_line(f"{problem}; {checkpoint.name} is now {renamed.name}, and the checkpoint before it is used")

    # ---------------------------------------------------------------- agreement of all ranks

    def check_same_view(self) -> None:
        """Raises MegaSoraError on all ranks unless all nodes see the same checkpoints."""
        views = self.ranks.gather_objects(self.ranks.share_on_node(self.view))
        problem = ""
        for rank, view in enumerate(views or ()):
            if not view.agrees_with(views[0]):
                problem = (
                    f"process {rank} sees {view} in {self.store.folder}, process 0 sees {views[0]}; run.dir must be "
                    "the same folder on all machines"
                )
                break
        problem = self.ranks.broadcast_object(problem)
        if problem:
            raise MegaSoraError(problem)

    def view(self) -> View:
        try:
            complete = self.store.complete()
        except OSError as error:
            return View([str(error)], "")
        try:
            return View(names(complete), read_manifest(complete[-1]).digest if complete else "")
        except MegaSoraError:
            return View(names(complete), "")  # loading it says what is wrong

    def agree(self, problem: str, is_damage: bool) -> tuple[str, bool]:
        """The problem of the first rank that has one, on all ranks; errors that are no damage come first."""
        by_rank = self.ranks.gather_objects((problem, is_damage))
        found = sorted((pair for pair in by_rank or () if pair[0]), key=lambda pair: pair[1])
        return self.ranks.broadcast_object(found[0] if found else ("", False))


def print_line(sentence: str) -> None:
    """Prints a line about the checkpoints; on the main process."""
    print(f"checkpoints: {sentence}", flush=True)
