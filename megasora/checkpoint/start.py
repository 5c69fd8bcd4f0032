"""How a launch starts: from which checkpoint of its run folder, or from step 0. The setting is `run.start`.

    resume-or-fresh        the newest checkpoint, or step 0 if the run has never saved one
    resume                 the newest checkpoint, whatever the history of the run folder says; there must be one
    resume:step-XXXXXXXX   this checkpoint; later ones are set aside as superseded
    fresh                  step 0, in a folder without checkpoints
    init:PATH              the same with the weights of PATH, a safetensors file or a checkpoint

The last three are done once: a later launch with the same setting, as a requeued job makes it, resumes what the first
one began. The newest checkpoint is the newest that verifies. Here manifest and state.json alone are verified; the
fragments follow when they are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megasora.checkpoint.damage import DamagedCheckpoint
from megasora.checkpoint.history import HISTORY, History, read_history
from megasora.checkpoint.imported import IMPORTED
from megasora.checkpoint.manifest import step_of
from megasora.checkpoint.store import CheckpointStore, names, read_state
from megasora.errors import MegaSoraError

BEGINNINGS = ("fresh", "init")


@dataclass(frozen=True)
class Start:
    """`checkpoint`: to resume from; None: step 0. `notes`: sentences for people. `damaged`: (checkpoint, problem).

    `is_exact`: no other checkpoint will do. `state`: the content of state.json.
    """

    checkpoint: Path | None
    notes: list[str] = field(default_factory=list)
    damaged: list[tuple[Path, str]] = field(default_factory=list)
    is_exact: bool = False
    state: dict[str, Any] = field(default_factory=dict)


def initial_weights_path(start: str) -> Path | None:
    """PATH of `init:PATH`; None for another `run.start`."""
    kind, _, argument = start.partition(":")
    return Path(argument).expanduser() if kind == "init" else None


def initial_weights_to_read(run_dir: Path, start: str) -> Path | None:
    """PATH of `init:PATH` unless the run is resumed, so that it need not exist then; None for another `run.start`."""
    return None if resumes(run_dir, start) else initial_weights_path(start)


def resumes(run_dir: Path, start: str) -> bool:
    """Whether a launch with this `run.start` loads a checkpoint of the folder, or fails: it begins no training."""
    return not begins(run_dir, start) and bool(CheckpointStore(run_dir / "checkpoints").complete())


def begins(run_dir: Path, start: str) -> bool:
    """Whether a launch with this `run.start` begins a new run in the folder, so that files of an old one must go."""
    return start.partition(":")[0] in BEGINNINGS and read_history(run_dir).start != start


def choose_start(store: CheckpointStore, start: str) -> Start:
    """What a launch with `run.start=start` starts from; changes nothing.

    Raises MegaSoraError if that is not certain: no checkpoint verifies, or the run has saved others than there are.
    """
    history, complete = read_history(store.run_dir), store.complete()
    kind, _, name = start.partition(":")
    if kind == "resume" and name and history.start != start:
        exact, state = find_exact(store, complete, name)
        check_trained(exact, state, start)
        return Start(exact, is_exact=True, state=state)
    newest, state, damaged = newest_readable(complete)
    if begins(store.run_dir, start):
        if newest is not None:
            raise MegaSoraError(
                f"run.start={start}: {store.run_dir} holds a run with checkpoints, the newest {newest.name}; choose "
                "another run.dir, or resume it with run.start=resume"
            )
        return Start(None, damaged=damaged)
    if newest is None:
        check_never_saved(store, history, damaged, start)
        return Start(None)
    check_trained(newest, state, start)
    missing = missing_checkpoints(store, history, newest)
    if missing and newest.name not in history.saved and start != "resume":
        raise MegaSoraError(
            f"{store.folder} has no checkpoint later than {newest.name}, but the run has saved {', '.join(missing)}; "
            f"restore or mount them, or resume from {newest.name} with run.start=resume"
        )
    notes = [f"{', '.join(missing)}, which the run has saved, is not in {store.folder}"] if missing else []
    if history.start == start:
        notes.append(f"run.start={start} was done by an earlier launch")
    latest = store.read_latest()
    if latest != newest.name and latest not in names([path for path, _ in damaged]) and not store.has_set_aside(latest):
        notes.append(f"{store.folder / 'latest'} names {latest or 'nothing'}, not {newest.name}")
    return Start(newest, notes, damaged, state=state)


def newest_readable(complete: list[Path]) -> tuple[Path | None, dict[str, Any], list[tuple[Path, str]]]:
    """(the newest checkpoint with an intact manifest and state.json or None, its state, the later ones with their
    problems)."""
    damaged = []
    for checkpoint in reversed(complete):
        try:
            return checkpoint, read_state(checkpoint), damaged
        except DamagedCheckpoint as error:
            damaged.append((checkpoint, error.problem))
    return None, {}, damaged


def find_exact(store: CheckpointStore, complete: list[Path], name: str) -> tuple[Path, dict[str, Any]]:
    """The checkpoint and its state. Raises MegaSoraError if there is no checkpoint `name`, or it is damaged."""
    for checkpoint in complete:
        if step_of(checkpoint.name) == step_of(name):
            return checkpoint, read_state(checkpoint)
    raise MegaSoraError(
        f"run.start=resume:{name}: {store.folder} has no {name}; it has {', '.join(names(complete)) or 'none'}"
    )


def check_trained(checkpoint: Path, state: dict[str, Any], start: str) -> None:
    """Raises MegaSoraError for a checkpoint of imported weights (imported.py): it has no state of a training."""
    if IMPORTED in state:
        raise MegaSoraError(
            f"run.start={start}: {checkpoint} holds imported weights to sample from, and no state of a training; train "
            f"them in another run.dir, with run.start=init:{checkpoint}"
        )


def check_never_saved(store: CheckpointStore, history: History, damaged: list[tuple[Path, str]], start: str) -> None:
    """Raises MegaSoraError if no checkpoint is left of a run that has saved one, or if there must be one."""
    kind = start.partition(":")[0]
    is_fresh = kind in BEGINNINGS or history.start == "fresh"  # which is done once
    again = "choose another run.dir" if is_fresh else "start from step 0 with run.start=fresh"
    if damaged or (history.saved and all(store.has_set_aside(name) for name in history.saved)):
        problems = "; ".join(problem for _, problem in damaged) or f"{', '.join(history.saved)}: set aside as damaged"
        raise MegaSoraError(
            f"no checkpoint in {store.folder} is whole ({problems}); restore one from a copy, or {again}"
        )
    if history.saved:
        raise MegaSoraError(
            f"{store.folder} has no checkpoint, but the run has saved {', '.join(history.saved)}; mount or restore the "
            f"folder, or {again}"
        )
    metrics = store.run_dir / "metrics.jsonl"
    if not (store.run_dir / HISTORY).exists() and metrics.is_file() and metrics.stat().st_size:
        raise MegaSoraError(
            f"{store.folder} has no checkpoint, and {store.run_dir} no {HISTORY}, but {metrics.name} has steps; mount "
            f"or restore the folder, or {again}"
        )
    if kind == "resume":
        raise MegaSoraError(f"run.start={start}: {store.folder} has no checkpoint; leave run.start out to begin a run")


def missing_checkpoints(store: CheckpointStore, history: History, newest: Path) -> list[str]:
    """Names of checkpoints that the run has saved after `newest`, and that are neither there nor set aside."""
    later = [name for name in history.saved if (step_of(name) or 0) > step_of(newest.name)]
    present = names(store.complete())
    return [name for name in later if name not in present and not store.has_set_aside(name)]
