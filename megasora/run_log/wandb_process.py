"""The process in which wandb runs, started by `wandb_log.WandbLog` as a script; it imports nothing else of MegaSora.

Standard input: a JSON line with the arguments of the run, then one `[step, values]` per line. Standard output: a line
for each thing that went wrong. At the end of its input it finishes the run, and ends after FINISH_SECONDS at the
latest, also if wandb or its server does not answer, and if the process that started it was killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterable
from typing import Any

INIT_SECONDS = 5  # for the server to answer; then the run is logged offline
FINISH_SECONDS = 30.0


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # sent to all processes of a job; the end of the input is the stop
    try:
        log_lines(sys.stdin)
    except BaseException as error:
        print_line(describe(error))


def log_lines(lines: Iterable[str]) -> None:
    """Logs all lines with wandb, and finishes the run."""
    lines = iter(lines)
    arguments = json.loads(next(lines))
    run = start_run(arguments)
    for line in lines:
        step, values = json.loads(line)
        run.log(values, step=step)
    timer = threading.Timer(FINISH_SECONDS, lambda: os._exit(1))
    timer.daemon = True
    timer.start()
    run.finish()


def start_run(arguments: dict[str, Any]) -> Any:
    """The run, offline if its server does not answer."""
    import wandb

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, init_timeout=INIT_SECONDS)
    try:
        return wandb.init(**arguments, settings=settings)
    except Exception as error:
        if arguments["mode"] != "online":
            raise
        print_line(
            f"{describe(error)}; logging offline, send it later: wandb sync {arguments['dir']}/wandb/offline-run-*"
        )
        return wandb.init(**{**arguments, "mode": "offline"}, settings=settings)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def print_line(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
