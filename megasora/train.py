"""`python -m megasora.train [--check] CONFIG [key=value ...]`, alone or under torchrun: starts a run, or resumes it.

The exit codes are those of megasora/errors.py. torchrun itself exits with 1 on any failure; RUN/exit.json has our code.
--check makes the checks before a run, in seconds and on one process, and prints run.dir.
"""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megasora.checks import check_run
from megasora.config import Config, differences, load
from megasora.errors import CONFIGURATION, CRASH, DONE, STOPPED, MegaSoraError
from megasora.stop import StopSignal

if TYPE_CHECKING:
    from megasora.parallel.mesh import Mesh
    from megasora.parallel.world import World
    from megasora.tasks.task import Task

MAIN_PRINTS_SECONDS = 5.0  # within which the main process has printed its error


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(
                __doc__,
                "\n\nExample: torchrun --nproc-per-node 2 -m megasora.train configs/demo.yaml run.dir=runs/demo",
            )
            return 0 if arguments else 2
        only_check = "--check" in arguments
        arguments = [text for text in arguments if text != "--check"]
        if not arguments:
            raise MegaSoraError("--check: give the configuration to check, e.g. configs/demo.yaml")
        config = load(arguments[0], arguments[1:])
        check_run(config)
    except (MegaSoraError, OSError) as error:  # e.g. no permission: the system's message names the file
        return print_error(error, getattr(error, "exit_code", CONFIGURATION))
    if only_check:
        print(config.run.dir)
        return DONE
    try:
        with StopSignal() as stop:
            train(config, stop)
        return DONE
    except (MegaSoraError, OSError) as error:
        return print_error(error, getattr(error, "exit_code", CRASH))


def print_error(error: Exception, code: int) -> int:
    """Prints one line on standard error, from one process if possible; returns the code."""
    rank = int(os.environ.get("RANK", "0"))
    if code == STOPPED:
        if rank == 0:
            print(f"megasora: stopped on request, {error}", file=sys.stderr, flush=True)
        return code
    if rank > 0:  # the main process prints first: the launcher kills the others as soon as one has exited
        time.sleep(MAIN_PRINTS_SECONDS)
    message = str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # a failed write names no file
        message += "; free some space on the file system of run.dir, or lower checkpoint.keep"
    print(f"megasora: error: {message}" + (f" (process {rank})" if rank else ""), file=sys.stderr, flush=True)
    return code


def train(config: Config, stop: StopSignal, build_task: Callable[[Config, World, Mesh], Task] | None = None) -> None:
    """One process of a run, from joining the process group to the record of its exit.

    `build_task`: what is trained; None for a VideoDiT. Raises MegaSoraError after an expected failure, as a stop.
    """
    import torch

    from megasora.parallel.mesh import build_mesh
    from megasora.parallel.world import init_distributed
    from megasora.run_log.launches import begin_launch, record_exit
    from megasora.run_log.rank_log import redirect_output
    from megasora.tasks.dit import DiTTask
    from megasora.trainer import Trainer
    from megasora.watchdog import Watchdog

    with init_distributed(config.run.device) as world:
        torch.set_num_threads(config.run.threads or max(1, (os.cpu_count() or 1) // world.local_size))
        check_same_configuration(config, world)
        run = Path(config.run.dir)
        watchdog = Watchdog(run, world.rank, world.size, config.run.hang_seconds, stop.requested)
        with lock_run_folder(run, world), redirect_output(run, world.rank), watchdog.watching():
            if world.is_main:
                begin_launch(run, world.size)
            world.barrier()  # from here on exit.json is of this launch
            try:
                watchdog.heartbeat("building the model")
                task = (build_task or DiTTask)(config, world, build_mesh(config.parallel, world.device.type))
                Trainer(config, world, task, stop.requested, watchdog.heartbeat).run()
            except (MegaSoraError, OSError) as error:
                record_exit(run, getattr(error, "exit_code", CRASH), str(error), world.rank)
                raise
            except Exception as error:
                traceback.print_exc()  # into the log of this process
                record_exit(run, CRASH, f"{type(error).__name__}: {error}".splitlines()[0], world.rank)
                sys.exit(CRASH)
            if world.is_main:
                record_exit(run, DONE, f"{config.run.steps} steps", world.rank)


@contextmanager
def lock_run_folder(run: Path, world: World) -> Iterator[None]:
    """The main process locks the run folder; raises MegaSoraError on all ranks if another launch holds the lock."""
    from megasora.locks import locked

    with ExitStack() as locks:
        problem = None
        if world.is_main:
            try:
                run.mkdir(parents=True, exist_ok=True)
                locks.enter_context(locked(run / ".lock", f"run.dir={run}"))
            except MegaSoraError as error:
                problem = str(error)
        problem = world.broadcast_object(problem)
        if problem:
            raise MegaSoraError(problem)
        yield


def check_same_configuration(config: Config, world: World) -> None:
    """All ranks must have the same configuration; raises MegaSoraError on all with the keys that differ."""
    by_rank = world.gather_objects(config)
    problem = None
    for rank, other in enumerate(by_rank or ()):
        changed = differences(other, config)
        if changed and problem is None:
            problem = (
                f"process {rank} was started with another configuration than process 0 ({'; '.join(changed[:8])}); "
                "give all processes the same file and the same settings"
            )
    problem = world.broadcast_object(problem)
    if problem:
        raise MegaSoraError(problem)


if __name__ == "__main__":
    sys.exit(main())
