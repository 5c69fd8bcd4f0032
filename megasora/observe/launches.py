"""The launches of a run: when and where each began, and how it ended.

    RUN/launches.jsonl   a line a launch, from the main process: when, where, and the exit of the one before
    RUN/exit.json        how the newest launch ended: code (megasora/errors.py), reason, rank, time; not there while it
                         runs, nor where it was killed

torchrun exits with 1 whatever its processes exit with, so exit.json is where a script reads our code. The first process
that says why it ends is believed; what the others say is a consequence.
"""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megasora.errors import CRASH
from megasora.observe.metrics import JsonLines

LAUNCHES, EXIT = "launches.jsonl", "exit.json"
BETTER_REASON_SECONDS = 1.0  # a broken connection is most often the end of another process, which says why


def begin_launch(run: Path, processes: int) -> None:
    """On the main process, once all have joined."""
    run.mkdir(parents=True, exist_ok=True)
    line: dict[str, Any] = {
        "time": round(time.time(), 3), "processes": processes, "host": platform.node(), "pid": os.getpid(),
        "before": read_exit(run),
    }  # fmt: skip
    if job := os.environ.get("SLURM_JOB_ID"):
        line |= {"job": job, "requeues": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}
    (run / EXIT).unlink(missing_ok=True)
    lines = JsonLines(run / LAUNCHES)
    lines.write(line)
    lines.close()


def note_exit(run: Path, code: int, reason: str, rank: int) -> None:
    """Writes exit.json, unless another process of this launch has. Never raises: the disk may be what is wrong."""
    with suppress(OSError):
        if code == CRASH and not (run / EXIT).exists():
            time.sleep(BETTER_REASON_SECONDS)
        text = json.dumps({"code": code, "reason": reason, "rank": rank, "time": round(time.time(), 3)})
        with open(run / EXIT, "x", encoding="utf-8") as file:
            file.write(text + "\n")


def read_exit(run: Path) -> dict[str, Any] | None:
    """How the newest launch ended; None where it has not said."""
    try:
        found = json.loads((run / EXIT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
