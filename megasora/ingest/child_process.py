"""Starts the processes of an ingest, and what each of them does first: it is killed with its parent, and leaves Ctrl-C
to it."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress

PR_SET_PDEATHSIG = 1
CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from megasora.ingest.{} import main; main()"


def start_process(module: str, environment: Mapping[str, str], **streams) -> subprocess.Popen:
    """Runs `main()` of megasora.ingest.`module`, with the folders of modules of this process.

    `environment`: added to that of this process. `streams`: other arguments of Popen. Standard output and error are
    pipes; a read of the latter does not wait.
    """
    path = json.dumps([os.path.abspath(folder) for folder in sys.path])
    command, env = [sys.executable, "-c", CODE.format(module), path], {**os.environ, **environment}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, **streams)
    os.set_blocking(process.stderr.fileno(), False)
    return process


def die_with_parent(parent: int) -> None:
    """Has this process killed with its parent, whose number is `parent`. It dumps no memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def exit_code_of(process: subprocess.Popen, timeout_seconds: float) -> int:
    """The exit code; a process that has not exited after `timeout_seconds` is killed."""
    try:
        return process.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
