"""RUN/logs/rank-00000.log: what each process prints, a file a process, appended to by every launch.

The main process's goes to the output of the job as well, by `tee`, which outlives a crash; on a terminal, where its
progress line lives, it goes there alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEE = 'trap "" TERM USR1 INT HUP; exec tee -a -- "$1"'  # a signal for all processes of a job must not end it


@contextmanager
def rank_log(run: Path, rank: int) -> Iterator[None]:
    """Standard output and standard error of this process go to its file until the end."""
    if rank == 0 and sys.stderr.isatty():
        yield
        return
    path = run / "logs" / f"rank-{rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    flush()
    saved = os.dup(1), os.dup(2)
    tee = None
    if rank == 0:
        tee = subprocess.Popen(["sh", "-c", TEE, "tee", path], stdin=subprocess.PIPE, stdout=2)
        target = os.dup(tee.stdin.fileno())
        tee.stdin.close()
    else:
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for number in (1, 2):
        os.dup2(target, number)
    os.close(target)
    try:
        yield
    finally:
        flush()
        for number, old in zip((1, 2), saved, strict=True):
            os.dup2(old, number)
            os.close(old)
        if tee is not None:
            try:
                tee.wait(timeout=5)
            except subprocess.TimeoutExpired:  # a process that we started still holds its end
                pass


def flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
