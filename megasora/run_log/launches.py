"""The launches of a run: when and where each began, and how it ended.

    RUN/launches.jsonl   one line per launch, from the main process: time, host, processes, exit of the previous launch
    RUN/exit.json        how the newest launch ended: code (megasora/errors.py), reason, rank, time; absent while it
                         runs, and after it was killed

torchrun exits with 1 whatever the exit codes of its processes, so scripts read our code from exit.json. The first
process that records an exit wins; later errors on other ranks are consequences of it.
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
from megasora.jsonl import JsonlWriter

LAUNCHES, EXIT = "launches.jsonl", "exit.json"
ROOT_CAUSE_SECONDS = 1.0  # a crash waits so long: most are a broken connection to a process that records the cause


def begin_launch(run_dir: Path, processes: int) -> None:
    """Records a launch. Call it on the main process, once all processes have joined."""
    run_dir.mkdir(parents=True, exist_ok=True)
    line: dict[str, Any] = {
        "time": round(time.time(), 3), "processes": processes, "host": platform.node(), "pid": os.getpid(),
        "previous_exit": read_exit(run_dir),
    }  # fmt: skip
    if job := os.environ.get("SLURM_JOB_ID"):
        line |= {"job": job, "requeues": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}
    (run_dir / EXIT).unlink(missing_ok=True)
    writer = JsonlWriter(run_dir / LAUNCHES)
    writer.write(line)
    writer.close()


def record_exit(run_dir: Path, code: int, reason: str, rank: int) -> None:
    """Writes exit.json, unless another process of this launch has. Never raises, even if the disk is full."""
    with suppress(OSError):
        if code == CRASH and not (run_dir / EXIT).exists():
            time.sleep(ROOT_CAUSE_SECONDS)
        text = json.dumps({"code": code, "reason": reason, "rank": rank, "time": round(time.time(), 3)})
        with open(run_dir / EXIT, "x", encoding="utf-8") as file:
            file.write(text + "\n")


def read_exit(run_dir: Path) -> dict[str, Any] | None:
    """How the newest launch ended, as exit.json holds it; None if no process has recorded it."""
    try:
        recorded = json.loads((run_dir / EXIT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return recorded if isinstance(recorded, dict) else None
