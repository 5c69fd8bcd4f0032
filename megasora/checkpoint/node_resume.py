"""Makes an ordinary checkpoint of the newest one that the disks of the nodes have together.

    each node --stored parts--> main process: steps newer than the newest in the run folder, of which every part is
    somewhere --> each node copies files of its parts into the staging folder, verified, its processes one file each
    --> main process: manifest and commit, as of any save. The run then resumes as always, in any layout.

A file that is damaged is taken from the other node that has it; if there is none, the next older step is tried.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megasora.checkpoint.damage import DamagedCheckpoint
from megasora.checkpoint.fragment_file import WrittenFile
from megasora.checkpoint.manifest import read_manifest, step_of
from megasora.checkpoint.node_copy import copy_file
from megasora.checkpoint.node_store import NodeStore, StoredPart
from megasora.checkpoint.nodes import NodeRanks
from megasora.checkpoint.ranks import Failure, failure_of, on_main, raise_first
from megasora.checkpoint.sharded import FOLDER, rank_file_name
from megasora.checkpoint.store import CheckpointStore, read_state
from megasora.errors import MegaSoraError

Heartbeat = Callable[[str], None]
Wanted = Mapping[int, Sequence[int]]  # part: ranks whose files are wanted


@dataclass(frozen=True)
class Candidate:
    """A step of which every part is on some node. `holders`: of each part, the nodes (`NodeRanks.node`) that have
    it."""

    step: int
    holders: list[list[int]]
    ranks: list[list[int]]  # of each part
    size: int  # bytes


@dataclass
class Copied:
    """What one rank has copied: files by name, the state, and ranks by part whose file is damaged, with the reasons."""

    files: dict[str, WrittenFile] = field(default_factory=dict)
    state: dict[str, Any] | None = None
    damaged: dict[int, list[int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    failure: Failure | None = None


def promote(store: NodeStore, shared: CheckpointStore, ranks: NodeRanks, heartbeat: Heartbeat) -> None:
    """Writes the newest checkpoint of the nodes to `shared`, if it is newer than those there. All ranks must call it.

    Raises OSError or MegaSoraError on all ranks if it cannot be written; then nothing of it is left.
    """
    heartbeat("looking for checkpoints on the disks of the nodes")
    found = ranks.gather_objects((ranks.node, *store.stored()) if ranks.local_rank == 0 else None)
    for candidate in on_main(ranks, lambda: find_candidates(found, shared)):
        on_main(ranks, lambda c=candidate: begin(shared, c))
        try:
            files, state = copy_all(candidate, store, shared, ranks, heartbeat)
            if state is not None:
                on_main(ranks, lambda c=candidate, f=files, s=state: commit(shared, c, f, s))
                return
        finally:
            if ranks.rank == 0:
                shutil.rmtree(shared.staging_dir(candidate.step), ignore_errors=True)


def find_candidates(
    found: list[tuple[int, list[StoredPart], list[str]] | None], shared: CheckpointStore
) -> list[Candidate]:
    """Newest first. `found`: of the first process of each node (node, parts, problems); None of others."""
    of_nodes, newest = [entry for entry in found if entry is not None], shared.newest()
    by_save: dict[tuple[int, str], list[tuple[int, StoredPart]]] = {}
    for node, parts, problems in of_nodes:
        for problem in problems:
            print_line(f"{problem} (on the node of process {node}); it is not used")
        for stored in parts:
            by_save.setdefault((stored.step, stored.part.save), []).append((node, stored))
    after, candidates = step_of(newest.name) if newest is not None else -1, []
    for (step, _), entries in sorted(by_save.items(), key=lambda item: item[0], reverse=True):
        if step <= after:
            continue
        one = {stored.part.node: stored for _, stored in entries}  # of each part
        missing = [k for k in range(entries[0][1].part.nodes) if k not in one]
        if missing:
            print_line(f"step {step} is not whole on the disks of the nodes: none has a part {missing[0]} of it")
            continue
        parts = [one[k] for k in range(len(one))]
        holders = [[node for node, stored in entries if stored.part.node == k] for k in range(len(parts))]
        of_ranks = [list(range(stored.part.first, stored.part.stop)) for stored in parts]
        candidates.append(Candidate(step, holders, of_ranks, sum(stored.size for stored in parts)))
    return candidates


def begin(shared: CheckpointStore, candidate: Candidate) -> None:
    (shared.begin(candidate.step, candidate.size) / FOLDER).mkdir()


def commit(shared: CheckpointStore, candidate: Candidate, files: dict[str, WrittenFile], state: dict[str, Any]) -> None:
    shared.commit(candidate.step, state, files)
    print_line(f"step {candidate.step} was put together from the disks of the nodes")


def copy_all(
    candidate: Candidate, store: NodeStore, shared: CheckpointStore, ranks: NodeRanks, heartbeat: Heartbeat
) -> tuple[dict[str, WrittenFile], dict[str, Any] | None]:
    """Copies all files to the staging folder; returns (all files on the main process, the state on all), or ({}, None)
    if one is damaged on all nodes that have it."""
    wanted, files, state = dict(enumerate(candidate.ranks)), dict[str, WrittenFile](), None
    tried: dict[int, set[int]] = {part: set() for part in wanted}
    while wanted:
        plan = assign(candidate, wanted, tried)
        if plan is None:
            return {}, None
        own = {part: wanted[part] for part, holder in plan.items() if holder == ranks.node}
        copied = copy_share(candidate.step, own, store, shared, ranks, heartbeat)
        raise_first(ranks, copied.failure)
        of_ranks, damaged = ranks.gather_objects(copied), dict[int, list[int]]()
        for other in of_ranks or ():
            files.update(other.files)
            state = state or other.state
            for part, numbers in other.damaged.items():
                damaged[part] = sorted([*damaged.get(part, []), *numbers])
            for problem in other.problems:
                print_line(f"{problem}; another copy of it is used, if there is one")
        wanted, state = ranks.broadcast_object((damaged, state))
    return files, state


def assign(candidate: Candidate, wanted: Wanted, tried: dict[int, set[int]]) -> dict[int, int] | None:
    """For each wanted part a node that has it and was not tried, which it then is; each node gets about equally many.
    None if a part has no such node."""
    load: dict[int, int] = {}
    plan = {}
    for part in wanted:
        nodes = [node for node in candidate.holders[part] if node not in tried[part]]
        if not nodes:
            return None
        plan[part] = min(nodes, key=lambda node: load.get(node, 0))
        load[plan[part]] = load.get(plan[part], 0) + len(wanted[part])
        tried[part].add(plan[part])
    return plan


def copy_share(
    step: int, wanted: Wanted, store: NodeStore, shared: CheckpointStore, ranks: NodeRanks, heartbeat: Heartbeat
) -> Copied:
    """Copies what this process has to of the files that are wanted of this node."""
    copied, in_turn = Copied(), [(part, rank) for part, numbers in wanted.items() for rank in numbers]
    for part, rank in in_turn[ranks.local_rank :: ranks.local_size]:
        name, folder = rank_file_name(rank), store.path(step, part)
        try:
            manifest = read_manifest(folder)
            if copied.state is None:
                copied.state = read_state(folder, manifest)
            written = WrittenFile(*manifest.files[name])
            target = shared.staging_dir(step) / name
            copy_file(folder / name, written, target, lambda size: heartbeat(f"copying step {step} to the run folder"))
            copied.files[name] = written
        except DamagedCheckpoint as error:
            copied.damaged.setdefault(part, []).append(rank)
            copied.problems.append(f"{error.problem} (on the node of process {ranks.node})")
        except (MegaSoraError, OSError) as error:
            copied.failure = failure_of(error)
            break
    return copied


def print_line(sentence: str) -> None:
    print(f"checkpoints of nodes: {sentence}", flush=True)
