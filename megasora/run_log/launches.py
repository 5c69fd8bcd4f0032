"""The launches of a run: when and where each began, and how it ended.

    RUN/launches.jsonl   one line per launch, from the main process: its id, time, host, processes, version of the code,
                         exit of the previous launch
    RUN/exit.json        how the newest launch ended: code (megasora/errors.py), reason, rank, time; absent while it
                         runs, and after it was killed
    RUN/.lock            held by the main process of a launch: its name, the id, and where its processes meet

torchrun exits with 1 whatever the exit codes of its processes, so scripts read our code from exit.json. The first
process that records an exit wins; later errors on other ranks are consequences of it. A process of an earlier launch
that has been suspended and wakes finds another id than its own as the newest, and records nothing.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from megasora.errors import CRASH, REMEDIES, MegaSoraError
from megasora.files import read_regular_file, write_text_atomic
from megasora.jsonl import JsonlWriter, parse_json, read_tail

LAUNCHES, EXIT, LOCK = "launches.jsonl", "exit.json", ".lock"
MAX_EXIT_BYTES = 1 << 20
ROOT_CAUSE_SECONDS = 1.0  # a crash waits so long: most are a broken connection to a process that records the cause


class Launch:
    """One launch, as one of its processes sees it.

    The main process makes the id; the others have it once they have joined (`id` is None before). `meeting_point`:
    where they meet; two launches that live at the same time have different ones.
    """

    def __init__(self, run_dir: Path, rank: int, meeting_point: str = ""):
        self.run_dir, self.rank, self.meeting_point = run_dir, rank, meeting_point
        self.id = uuid.uuid4().hex if rank == 0 else None
        self.previous: str | None = None  # id of the launch before this one

    @property
    def note(self) -> str:
        """What the main process writes into the lock file."""
        return json.dumps({"launch": self.id, "meeting_point": self.meeting_point})

    def find_previous(self) -> None:
        """Reads which launch is the newest before this one begins."""
        self.previous = newest_launch(self.run_dir)

    def begin(self, processes: int, code: str = "") -> str | None:
        """Records the launch; on the main process, once all processes have joined. `code`: version of the sources.

        Returns the version that the previous launch ran, if it was another one.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        line: dict[str, Any] = {
            "launch": self.id, "time": round(time.time(), 3), "processes": processes, "host": platform.node(),
            "pid": os.getpid(), "code": code, "previous_exit": read_exit(self.run_dir),
        }  # fmt: skip
        if job := os.environ.get("SLURM_JOB_ID"):
            line |= {"job": job, "requeues": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}
        earlier = [before["code"] for before in read_tail(self.run_dir / LAUNCHES) if before.get("code")]
        writer = JsonlWriter(self.run_dir / LAUNCHES)
        writer.write(line)
        writer.close()
        (self.run_dir / EXIT).unlink(missing_ok=True)
        return earlier[-1] if earlier and code and earlier[-1] != code else None

    def has_begun(self) -> bool:
        return self.id is not None and newest_launch(self.run_dir) == self.id

    def is_current(self) -> bool:
        """Whether no other launch has begun since this one, so that this process may write into the run folder."""
        if newest_launch(self.run_dir) not in (self.id, self.previous):
            return False
        # without an id: the launch that holds the lock is this one, or another one that runs
        return self.id is not None or read_lock(self.run_dir).get("meeting_point") in (None, self.meeting_point)

    def check_current(self) -> None:
        """Raises MegaSoraError if another launch has begun: this process was suspended, and must not write."""
        if not self.is_current():
            raise MegaSoraError(
                f"{self.run_dir} belongs to another launch since this process was suspended; nothing was written"
            )

    def record_exit(self, code: int, reason: str) -> None:
        """Writes exit.json, unless another process of this launch has, or another launch has begun.

        Never raises, and leaves no incomplete file, even if the disk is full; then it prints the file and a remedy.
        """
        path = self.run_dir / EXIT
        try:
            begun = self.has_begun()
            if code == CRASH and begun and not path.exists():
                time.sleep(ROOT_CAUSE_SECONDS)
            if not self.is_current():
                return
            values = {"code": code, "reason": reason, "rank": self.rank, "time": round(time.time(), 3)}
            if begun:
                create_atomic(path, json.dumps({**values, "launch": self.id}) + "\n", self.rank)
            else:  # it replaces the exit of the previous launch
                write_text_atomic(path, json.dumps(values) + "\n")
        except OSError as error:
            remedy = REMEDIES.get(error.errno, "look at run.dir")
            print(f"megasora: {path} cannot be written ({error.strerror}); {remedy}", file=sys.stderr)


def create_atomic(path: Path, text: str, rank: int) -> None:
    """Creates a file with its whole content, unless it exists. `rank`: of the process, for a name of its own."""
    temporary = path.with_name(f".{path.name}.{rank}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not path.exists():
                os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def newest_launch(run_dir: Path) -> str | None:
    """The id of the newest launch that has begun, or None."""
    lines = read_tail(run_dir / LAUNCHES)
    return lines[-1].get("launch") if lines else None


def read_lock(run_dir: Path) -> dict[str, Any]:
    """The note of the launch that holds the lock; empty if none does, or it is of another version."""
    try:
        note = parse_json((run_dir / LOCK).read_bytes().partition(b"\n")[2])
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def read_exit(run_dir: Path) -> dict[str, Any] | None:
    """How the newest launch ended, as exit.json holds it; None if no process has recorded it."""
    try:
        recorded = parse_json(read_regular_file(run_dir / EXIT, MAX_EXIT_BYTES))
    except (OSError, ValueError):
        return None
    if not isinstance(recorded, dict) or recorded.get("launch") not in (None, newest_launch(run_dir)):
        return None
    return recorded
