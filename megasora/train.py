"""`python -m megasora.train [--check] CONFIG [key=value ...]`, alone or under torchrun: starts a run, or resumes it.

The exit codes are those of megasora/errors.py. torchrun itself exits with 1 on any failure; RUN/exit.json has our code.
--check makes the checks before a run, in seconds and on one process, and prints run.dir.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megasora.checks import check_run
from megasora.codec import resolve_codec
from megasora.config import Config, load
from megasora.errors import CONFIGURATION, CRASH, DONE, STOPPED, MegaSoraError, describe
from megasora.files import check_folder
from megasora.locks import locked
from megasora.parallel.launcher import Launcher, check_meeting_point, die_with_launcher, process_rank, read_launcher
from megasora.run_log.code_version import source_hash
from megasora.run_log.launches import LOCK, Launch
from megasora.run_log.rank_log import redirect_output
from megasora.stop import StopSignal
from megasora.watchdog import Watchdog

if TYPE_CHECKING:
    from megasora.parallel.mesh import Mesh
    from megasora.parallel.world import World
    from megasora.tasks.task import Task

MAIN_PRINTS_SECONDS = 5.0  # within which the main process has printed its error


@dataclass(frozen=True)
class Training:
    """What an entry point trains."""

    help: str
    resolve: Callable[[Config], Config]  # completes the settings, e.g. by those of a codec on disk
    check: Callable[[Config], None]  # before torch is loaded
    build_task: Callable[[Config, World, Mesh], Task]


def main(arguments: list[str] | None = None, training: Training | None = None) -> int:
    """`training`: None for that of a VideoDiT."""
    arguments = sys.argv[1:] if arguments is None else arguments
    training = training or DIT
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(training.help)
            return 0 if arguments else 2
        only_check = "--check" in arguments
        arguments = [text for text in arguments if text != "--check"]
        if not arguments:
            raise MegaSoraError("--check: give the configuration to check, e.g. configs/demo.yaml")
        config = training.resolve(load(arguments[0], arguments[1:]))
        if only_check:
            training.check(config)
            print(config.run.dir)
            return DONE
    except (MegaSoraError, OSError) as error:  # e.g. no permission: the system's message names the file
        return print_error(error, getattr(error, "exit_code", CONFIGURATION))
    try:
        with StopSignal() as stop:
            train(config, stop, training.build_task, training.check)
        return DONE
    except (MegaSoraError, OSError) as error:
        return print_error(error, getattr(error, "exit_code", CRASH))


def resolve_dit(config: Config) -> Config:
    return dataclasses.replace(config, codec=resolve_codec(config.codec))


def build_dit_task(config: Config, world: World, mesh: Mesh) -> Task:
    from megasora.tasks.dit import DiTTask

    return DiTTask(config, world, mesh)


DIT = Training(
    f"{__doc__}\n\nExample: torchrun --nproc-per-node 2 -m megasora.train configs/demo.yaml run.dir=runs/demo",
    resolve_dit,
    check_run,
    build_dit_task,
)


def print_error(error: Exception, code: int) -> int:
    """Prints one line on standard error, from one process if possible; returns the code."""
    rank = process_rank()
    if code == STOPPED:
        if rank == 0:
            print(f"megasora: stopped on request, {error}", file=sys.stderr, flush=True)
        return code
    if rank > 0:  # the main process prints first: the launcher kills the others as soon as one has exited
        time.sleep(MAIN_PRINTS_SECONDS)
    message = describe(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        message += ", or lower checkpoint.keep"
    print(f"megasora: error: {message}" + (f" (process {rank})" if rank else ""), file=sys.stderr, flush=True)
    return code


def train(
    config: Config,
    stop: StopSignal,
    build_task: Callable[[Config, World, Mesh], Task] = build_dit_task,
    check: Callable[[Config], None] = lambda config: None,
) -> None:
    """One process of a run, from the lock of its folder to the record of its exit.

    `build_task`: what is trained. `check(config)`: before torch is loaded. Raises MegaSoraError after an expected
    failure, as a stop.
    """
    launcher, run = read_launcher(os.environ), Path(config.run.dir)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_launcher()
    launch = Launch(run, launcher.rank, launcher.meeting_point)
    watchdog = Watchdog(launch, launcher.size, config.run.hang_seconds, stop.requested)
    with ExitStack() as resources:
        resources.enter_context(watchdog.watching())
        with stop.ending("before the first step"):
            resources.enter_context(lock_run_folder(launch))
            launch.find_previous()
            world = resources.enter_context(join(config, launcher, watchdog, check))
            launch.id = world.broadcast_object(launch.id)
            earlier_code = launch.begin(world.size, source_hash()) if world.is_main else None
            world.barrier()  # from here on exit.json is of this launch
            watchdog.begin("comparing the processes")
        resources.enter_context(redirect_output(run, world.rank))
        resources.enter_context(recorded_exit(launch, f"{config.run.steps} steps"))
        if earlier_code:
            print(f"the code has changed since the previous launch: {earlier_code} -> {source_hash()}", flush=True)
        check_same_start(config, world)
        train_task(config, world, watchdog, stop, build_task)


@contextmanager
def lock_run_folder(launch: Launch) -> Iterator[None]:
    """The main process locks the run folder. Raises MegaSoraError if another launch holds the lock.

    Folders that it had to make are removed at the end if nothing was written into them.
    """
    with ExitStack() as locks:
        if launch.rank == 0:
            run, what = launch.run_dir, f"run.dir={launch.run_dir}"
            check_folder(run, what)
            locks.callback(remove_empty, [folder for folder in (run, *run.parents) if not folder.exists()])
            try:
                locks.enter_context(locked(run / LOCK, what, note=launch.note))
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise
                raise MegaSoraError(f"{what} cannot be written: {describe(error)}") from error
        yield


def remove_empty(folders: list[Path]) -> None:
    """Removes folders, innermost first, up to one that is not empty."""
    with suppress(OSError):
        for folder in folders:
            if folder.exists():
                folder.rmdir()


@contextmanager
def join(config: Config, launcher: Launcher, watchdog: Watchdog, check: Callable[[Config], None]) -> Iterator[World]:
    """Makes the checks before a run, loads torch and joins the other processes."""
    check_meeting_point(launcher)
    watchdog.heartbeat("checking the run")
    try:
        check(config)
    except OSError as error:  # its message names the file
        raise MegaSoraError(str(error)) from error
    watchdog.heartbeat("loading torch")
    import torch

    from megasora.parallel.rendezvous import Rendezvous
    from megasora.parallel.world import init_distributed

    torch.set_num_threads(config.run.threads or max(1, (os.cpu_count() or 1) // launcher.local_size))
    rendezvous = Rendezvous(launcher, config.run.hang_seconds)
    watchdog.heartbeat("joining the other processes")
    watchdog.describe_absent = rendezvous.describe_absent
    with init_distributed(config.run.device, launcher, rendezvous) as world:
        watchdog.describe_absent = lambda: ""
        yield world


@contextmanager
def recorded_exit(launch: Launch, done: str) -> Iterator[None]:
    """Records how the launch ends; after success, `done`. An unexpected error becomes an exit with errors.CRASH."""
    try:
        yield
    except (MegaSoraError, OSError) as error:
        launch.record_exit(getattr(error, "exit_code", CRASH), str(error))
        raise
    except Exception as error:
        traceback.print_exc()  # into the log of this process
        launch.record_exit(CRASH, f"{type(error).__name__}: {error}".splitlines()[0])
        sys.exit(CRASH)
    if launch.rank == 0:
        launch.record_exit(DONE, done)


def check_same_start(config: Config, world: World) -> None:
    """All processes must start with the same settings, code and shards; raises MegaSoraError on all if not."""
    from megasora.preflight.same_start import find_difference, read_start_state

    states = world.gather_objects(read_start_state(config))
    problem = world.broadcast_object(find_difference(states) if states else None)
    if problem:
        raise MegaSoraError(problem)


def train_task(
    config: Config,
    world: World,
    watchdog: Watchdog,
    stop: StopSignal,
    build_task: Callable[[Config, World, Mesh], Task],
) -> None:
    """Builds the task and trains it."""
    from megasora.parallel.mesh import build_mesh
    from megasora.trainer import Trainer

    watchdog.heartbeat("building the model")
    task = build_task(config, world, build_mesh(config.parallel, world.device.type))
    Trainer(config, world, task, stop.requested, watchdog.heartbeat).run()
    task.finish(watchdog.heartbeat)


if __name__ == "__main__":
    sys.exit(main())
