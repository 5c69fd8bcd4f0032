"""Log files of the processes: RUN/logs/rank-00000.log is what rank 0 prints; every launch appends.

Output of the main process also goes to the output of the job, through a `tee` process that survives a crash. If its
standard error is a terminal, where the live progress line is, it goes to the terminal alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEE = 'trap "" TERM USR1 INT HUP; exec tee -a -- "$1"'  # signals sent to all processes of a job must not end it
STDOUT, STDERR = 1, 2
TEE_CLOSE_SECONDS = 5


@contextmanager
def redirect_output(run_dir: Path, rank: int) -> Iterator[None]:
    """Within the context, standard output and standard error of this process go to the log file of its rank."""
    if rank == 0 and sys.stderr.isatty():
        yield
        return
    path = run_dir / "logs" / f"rank-{rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    flush()
    saved = {fd: os.dup(fd) for fd in (STDOUT, STDERR)}
    tee = start_tee(path) if rank == 0 else None
    target = tee.stdin.fileno() if tee else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for fd in saved:
        os.dup2(target, fd)
    if tee:
        tee.stdin.close()
    else:
        os.close(target)
    try:
        yield
    finally:
        flush()
        for fd, original in saved.items():
            os.dup2(original, fd)
            os.close(original)
        if tee:
            try:
                tee.wait(timeout=TEE_CLOSE_SECONDS)
            except subprocess.TimeoutExpired:  # a child process still holds its end of the pipe
                pass


def start_tee(path: Path) -> subprocess.Popen:
    """A process that copies its standard input to `path` and to our standard error."""
    return subprocess.Popen(["sh", "-c", TEE, "tee", path], stdin=subprocess.PIPE, stdout=STDERR)


def flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
