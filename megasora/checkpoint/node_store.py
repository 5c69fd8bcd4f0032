"""Checkpoints on the disk of one node: what its processes have saved, and a copy of what those of the node before have.

    checkpoint.node.dir/megasora-RUN/LAUNCH/step-00000100-3/    fragments/ (files of the processes of node 3),
                                                                state.json, node.json, manifest.json
    RUN/node_checkpoints.json                                   {"run": RUN, "launch": LAUNCH}

A part of a checkpoint is a node's share of it; all parts of a step, wherever they are found, are the checkpoint that
a save to the run folder would have written. LAUNCH is new in each launch, so that what earlier ones have left on a node
that was away is never used. A save is written to `.step-00000100-3.part` and renamed, as in store.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from megasora.checkpoint.fragment_file import WrittenFile
from megasora.checkpoint.manifest import check_kind_and_size, describe, read_json, read_manifest, step_of
from megasora.checkpoint.sharded import rank_file_name
from megasora.checkpoint.store import (
    STATE_FILE,
    check_room,
    complete_folder,
    delete_folder,
    read_state,
)
from megasora.errors import MegaSoraError
from megasora.files import read_regular_file, sync, write_text_atomic
from megasora.jsonl import parse_json

KEY = "checkpoint.node.dir"
NODE_FILE, IDS = "node.json", "node_checkpoints.json"
ID = re.compile("[0-9a-f]{16}", re.ASCII)
MAX_IDS_BYTES = 4096


@dataclass(frozen=True)
class Part:
    """A node's share of a checkpoint: number `node` of `nodes`, with the files of ranks `first .. stop - 1`. `save`: a
    random name of the save, by which parts of two saves of the same step are told apart."""

    save: str
    node: int
    nodes: int
    first: int
    stop: int


@dataclass(frozen=True)
class StoredPart:
    step: int
    part: Part
    size: int  # bytes of its files


class NodeStore:
    """The parts on this node's disk, in `folder`. No method is a collective."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, step: int, node: int) -> Path:
        return self.folder / f"step-{step:08d}-{node}"

    def staging_dir(self, step: int, node: int) -> Path:
        return self.folder / f".step-{step:08d}-{node}.part"

    # ---------------------------------------------------------------- saving

    def begin(self, step: int, nodes: list[int], num_bytes: int) -> None:
        """Creates empty staging folders of these parts. Raises OSError if the disk has no room for `num_bytes`."""
        for node in nodes:
            shutil.rmtree(self.staging_dir(step, node), ignore_errors=True)
            self.staging_dir(step, node).mkdir(parents=True)
        try:
            check_room(self.staging_dir(step, nodes[0]), num_bytes, f"{KEY}: the checkpoint of step {step}")
        except OSError:
            self.discard(step, nodes)
            raise

    def commit(self, step: int, part: Part, state: str, files: dict[str, WrittenFile]) -> None:
        """Makes a part visible. `state`: text of state.json. `files`: what is in the staging folder, by name."""
        staging, final = self.staging_dir(step, part.node), self.path(step, part.node)
        texts = {STATE_FILE: state, NODE_FILE: json.dumps(dataclasses.asdict(part)) + "\n"}
        complete_folder(staging, step, texts, files)
        delete_folder(final)
        os.replace(staging, final)
        sync(self.folder)

    def discard(self, step: int, nodes: list[int]) -> None:
        for node in nodes:
            shutil.rmtree(self.staging_dir(step, node), ignore_errors=True)

    def keep_newest(self, keep: int, after: int = -1) -> None:
        """Deletes all parts but those of the `keep` newest steps, and those of steps up to `after`."""
        folders = self.folders()
        newest = sorted({step_of(path.name) for path in folders})[-keep:]
        for folder in folders:
            if step_of(folder.name) not in newest or step_of(folder.name) <= after:
                delete_folder(folder)

    # ---------------------------------------------------------------- finding

    def folders(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if step_of(path.name) is not None)

    def stored(self) -> tuple[list[StoredPart], list[str]]:
        """(parts whose small files are whole, what is wrong with the others)."""
        parts, problems = [], []
        for folder in self.folders():
            try:
                parts.append(self.read_part(folder))
            except (MegaSoraError, OSError) as error:
                problems.append(getattr(error, "problem", str(error)))
        return parts, problems

    def read_part(self, folder: Path) -> StoredPart:
        """Verifies manifest, state.json and node.json, and the sizes of the files. Raises MegaSoraError or OSError."""
        manifest = read_manifest(folder)
        read_state(folder, manifest)
        try:
            part = Part(**read_json(folder, manifest, NODE_FILE))
            expected = {STATE_FILE, NODE_FILE, *map(rank_file_name, range(part.first, part.stop))}
            is_right = ID.fullmatch(part.save) and 0 <= part.node < part.nodes and 0 <= part.first < part.stop
        except TypeError:
            is_right = False
        if not is_right or manifest.files.keys() != expected or folder != self.path(manifest.step, part.node):
            raise MegaSoraError(f"{folder} is no part of a checkpoint of this run")
        for name in manifest.files:
            check_kind_and_size(folder, manifest, name)
        return StoredPart(manifest.step, part, sum(size for size, _ in manifest.files.values()))


# ---------------------------------------------------------------- the folder of a run on a node


@dataclass(frozen=True)
class NodeIds:
    """Random names of a run and of its last launch. `launch`: empty if no launch has saved on nodes."""

    run: str
    launch: str = ""


def expanded(folder: str) -> Path:
    """checkpoint.node.dir with the values of environment variables, e.g. $SLURM_TMPDIR.

    Raises MegaSoraError if one is not set.
    """
    path = os.path.expandvars(folder)
    if match := re.search(r"\$\{?(\w+)\}?", path):
        raise MegaSoraError(f"{KEY}={folder}: the environment has no variable {match[1]}; give a folder on each node")
    return Path(path)


def run_folder(folder: str, ids: NodeIds) -> Path:
    return expanded(folder) / f"megasora-{ids.run}"


def read_ids(run_dir: Path) -> NodeIds:
    """Writes new ones for a run that has none. Raises MegaSoraError if the file is damaged."""
    path = run_dir / IDS
    try:
        ids = NodeIds(**parse_json(read_regular_file(path, MAX_IDS_BYTES)))
        if not (ID.fullmatch(ids.run) and (not ids.launch or ID.fullmatch(ids.launch))):
            raise ValueError("run and launch have 16 hexadecimal digits")
        return ids
    except FileNotFoundError:
        return write_ids(run_dir, NodeIds(new_id()))
    except (OSError, ValueError, TypeError) as error:
        problem = describe(error)
        raise MegaSoraError(
            f"{path} cannot be read: {problem}; remove it, checkpoints on the disks of nodes are then not used"
        ) from None


def write_ids(run_dir: Path, ids: NodeIds) -> NodeIds:
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text_atomic(run_dir / IDS, json.dumps(dataclasses.asdict(ids)) + "\n")
    return ids


def new_id() -> str:
    return secrets.token_hex(8)


def prepare(store: NodeStore) -> None:
    """Makes the folder of a launch, and removes those of earlier ones."""
    store.folder.mkdir(parents=True, exist_ok=True)
    for other in store.folder.parent.iterdir():
        if other.is_symlink() or not other.is_dir():
            other.unlink(missing_ok=True)
        elif other != store.folder:
            shutil.rmtree(other, ignore_errors=True)
