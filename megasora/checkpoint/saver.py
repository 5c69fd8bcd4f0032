"""Saves and loads a run: the fragments of all ranks and one JSON object.

save      main process: staging folder; all ranks: their fragments; main process: state.json, checksums, commit
resume    main process: chooses a checkpoint (start.py); all ranks: verify it, read state.json, load their fragments

All ranks load the same checkpoint: each compares what it sees with what the main process sees. If any rank finds it
damaged, the main process sets it aside and chooses again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megasora.checkpoint.damage import DamagedCheckpoint
from megasora.checkpoint.history import HISTORY, History, read_history, write_history
from megasora.checkpoint.manifest import describe, read_manifest, verify_checksums
from megasora.checkpoint.sharded import ShardedCheckpoint, write_fragments
from megasora.checkpoint.start import Start, choose_start
from megasora.checkpoint.store import DAMAGED, CheckpointStore, names, read_state, remove_incomplete
from megasora.errors import MegaSoraError
from megasora.fragment import Fragment

MAX_SHOWN = 4  # checkpoints in a message


class Ranks(Protocol):
    """The collectives over all ranks that saving and loading needs; `megasora.parallel.world.World` has them."""

    rank: int

    def barrier(self) -> None: ...

    def gather_objects(self, value: object) -> list | None: ...

    def broadcast_object(self, value: object) -> object: ...


@dataclass(frozen=True)
class View:
    """What a rank sees of the checkpoints."""

    names: list[str]
    newest_sha256: str  # of the newest one's manifest; empty if there is none, or if it cannot be read

    def agrees_with(self, other: View) -> bool:
        """A manifest that only one of them can read is damage, which is found when the checkpoint is loaded."""
        digests = {self.newest_sha256, other.newest_sha256} - {""}
        return self.names == other.names and len(digests) < 2

    def __str__(self) -> str:
        shown = ", ".join(self.names[-MAX_SHOWN:]) or "no checkpoint"
        return f"{shown} (manifest {self.newest_sha256[:8]})" if self.newest_sha256 else shown


class CheckpointSaver:
    """The checkpoints of a run, as one rank sees them. Call `save` and `resume` on all ranks.

    `fragments`: all of this rank, with live values. `is_primary(fragment)`: whether this rank writes it; of replicas,
    one rank does. Raises ValueError if fragments have different kinds of values.
    """

    def __init__(
        self, store: CheckpointStore, fragments: list[Fragment], is_primary: Callable[[Fragment], bool], ranks: Ranks
    ):
        kinds = {tuple(fragment.values) for fragment in fragments}
        if len(kinds) > 1:
            raise ValueError(f"all fragments need the same kinds of values, not {sorted(kinds)}")
        self.store, self.fragments, self.is_primary, self.ranks = store, fragments, is_primary, ranks
        self.is_main = ranks.rank == 0

    # ---------------------------------------------------------------- saving

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes a checkpoint; the main process makes it visible once all ranks have written. `state`: JSON values."""
        if self.is_main:
            self.store.begin(step)
        self.ranks.barrier()
        staging = self.store.staging_dir(step)
        write_fragments(staging, self.ranks.rank, [f for f in self.fragments if self.is_primary(f)])
        self.ranks.barrier()
        if self.is_main:
            self.store.write_state(step, state)
            self.store.commit(step)
        self.ranks.barrier()

    # ---------------------------------------------------------------- loading

    def resume(self, start: str, before_load: Callable[[], None] = lambda: None) -> dict[str, Any] | None:
        """Loads the checkpoint that `run.start=start` asks for into the fragments; returns its state with `step`, or
        None for step 0. `before_load()` is called before each attempt.

        Raises MegaSoraError on all ranks if the start is not certain, see `choose_start`, or a checkpoint does not fit.
        """
        self.check_same_view()
        while True:
            before_load()
            chosen, digest = self.on_main(lambda: self.choose(start))
            state, damage = None, ""
            if chosen.checkpoint is not None:
                state, damage = self.load(chosen.checkpoint.name, digest)
            if not damage:
                self.on_main(lambda c=chosen: self.finish(c, start))
                return state
            if chosen.is_exact:
                raise MegaSoraError(f"run.start={start}: {damage}; resume from another one, e.g. run.start=resume")
            self.on_main(lambda c=chosen, text=damage: self.set_aside(c.checkpoint, text))

    def choose(self, start: str) -> tuple[Start, str]:
        """On the main process: the start and the SHA-256 of the chosen manifest; sets aside what is damaged."""
        chosen = choose_start(self.store, start)
        for checkpoint, problem in chosen.damaged:
            self.set_aside(checkpoint, problem)
        for note in chosen.notes:
            print_line(note)
        if chosen.checkpoint is None:
            return chosen, ""
        return chosen, read_manifest(chosen.checkpoint).sha256

    def load(self, name: str, digest: str) -> tuple[dict[str, Any] | None, str]:
        """Loads checkpoint `name` on all ranks; returns its state and "", or None and what is damaged on some rank.

        `digest`: SHA-256 of its manifest on the main process. Raises MegaSoraError on all ranks for another problem.
        """
        state, problem, is_damage = self.try_load(name, digest)
        problem, is_damage = self.agree(problem, is_damage)
        if problem and not is_damage:
            raise MegaSoraError(problem)
        return (None, problem) if problem else (state, "")

    def try_load(self, name: str, digest: str) -> tuple[dict[str, Any] | None, str, bool]:
        """Loads checkpoint `name`, whose manifest has the SHA-256 `digest` on the main process.

        Returns (state, problem of this rank or empty, whether the problem is damage).
        """
        checkpoint = self.store.folder / name
        try:
            own = verify_checksums(checkpoint).sha256
            if own != digest:
                raise MegaSoraError(
                    f"process {self.ranks.rank} sees another {checkpoint} than process 0 (SHA-256 of the manifest "
                    f"{own[:8]}, {digest[:8]} there); run.dir must be the same folder on all machines"
                )
            state, sharded = read_state(checkpoint), ShardedCheckpoint(checkpoint)
            for fragment in self.fragments:
                sharded.load_into(fragment)
            return state, "", False
        except DamagedCheckpoint as error:
            return None, error.problem, True
        except OSError as error:  # while the fragments were read
            return None, f"{error.filename or checkpoint} cannot be read: {describe(error)}", True
        except MegaSoraError as error:
            return None, str(error), False

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
        """Raises MegaSoraError on all ranks unless all see the same checkpoints."""
        views = self.ranks.gather_objects(self.view())
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
            return View(names(complete), read_manifest(complete[-1]).sha256 if complete else "")
        except MegaSoraError:
            return View(names(complete), "")  # loading it says what is wrong

    def agree(self, problem: str, is_damage: bool) -> tuple[str, bool]:
        """The problem of the first rank that has one, on all ranks; errors that are no damage come first."""
        by_rank = self.ranks.gather_objects((problem, is_damage))
        found = sorted((pair for pair in by_rank or () if pair[0]), key=lambda pair: pair[1])
        return self.ranks.broadcast_object(found[0] if found else ("", False))

    def on_main(self, action: Callable[[], Any]) -> Any:
        """What `action()` returned on the main process, on all ranks; its MegaSoraError or OSError is raised on all."""
        result, error = None, None
        if self.is_main:
            try:
                result = action()
            except (MegaSoraError, OSError) as caught:
                error = caught
        is_system = isinstance(error, OSError)
        result, message, is_system = self.ranks.broadcast_object((result, str(error or ""), is_system))
        if error is not None:
            raise error
        if message:
            raise OSError(message) if is_system else MegaSoraError(message)
        return result


def print_line(sentence: str) -> None:
    """Prints a line about the checkpoints; on the main process."""
    print(f"checkpoints: {sentence}", flush=True)
