"""`python -m megasora.train [--check] CONFIG [key=value ...]`, alone or under torchrun: a run begins, or goes on.

It ends with a code of megasora/errors.py. torchrun itself ends with 1 then, whatever the code: RUN/exit.json has ours.
--check stops where the run would begin: it finds what is wrong in seconds, on one process, and prints run.dir.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megasora.config import Config, differences, load
from megasora.errors import CONFIGURATION, CRASH, DONE, STOPPED, MegaSoraError
from megasora.stop import StopSignal

if TYPE_CHECKING:
    from megasora.data.mixture import Mixture
    from megasora.parallel.world import World

# what may change between two launches of one run without changing what is trained
FREE_KEYS = (
    "run.dir", "run.device", "run.threads", "data.shards", "data.mixture", "data.prefetch",
    "data.threads", "data.timeout", "data.max_bad_fraction", "ingest", "checkpoint", "validation",
    "sample", "evaluation", "wandb", "run.debug_parallel", "run.debug_every", "run.hang_seconds",
    "run.ledger", "model.kernels", "model.attention", "model.deterministic", "model.recompute",
    "model.recompute_blocks", "parallel",
)  # fmt: skip
OTHERS_WAIT_SECONDS = 5.0  # in which the main process has told what is wrong


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(
                __doc__,
                "\n\nExample: torchrun --nproc-per-node 2 -m megasora.train configs/demo.yaml run.dir=runs/demo",
            )
            return 0 if arguments else 2
        only_check = arguments[0] == "--check"
        arguments = arguments[only_check:]
        if not arguments:
            raise MegaSoraError("--check: give the configuration that shall be checked, e.g. configs/demo.yaml")
        config = load(arguments[0], arguments[1:])
        check_run_folder(config)
        check_kernels(config)
        check_parallel(config)
        check_data(config)
    except (MegaSoraError, OSError) as error:  # no permission: the system's words name the file
        return tell(error, getattr(error, "exit_code", CONFIGURATION))
    if only_check:
        print(config.run.dir)
        return DONE
    try:
        with StopSignal() as stop:
            train(config, stop)
        return DONE
    except (MegaSoraError, OSError) as error:  # no space: the system's words name the file
        return tell(error, getattr(error, "exit_code", CRASH))


def tell(error: Exception, code: int) -> int:
    """One line on standard error, from one process if it can be; gives back the code."""
    rank = int(os.environ.get("RANK", "0"))
    if code == STOPPED:
        if rank == 0:
            print(f"megasora: stopped on request, {error}", file=sys.stderr, flush=True)
        return code
    if rank > 0:  # let the main process say it: the launcher ends the others as soon as one is gone
        time.sleep(OTHERS_WAIT_SECONDS)
    print(f"megasora: error: {error}" + (f" (process {rank})" if rank else ""), file=sys.stderr, flush=True)
    return code


def check_run_folder(config: Config) -> None:
    """A run folder belongs to one configuration."""
    saved = Path(config.run.dir) / "config.yaml"
    if not saved.is_file():
        return
    changed = differences(config, load(saved), FREE_KEYS)
    if changed:
        raise MegaSoraError(
            f"run.dir={config.run.dir} already holds another configuration ({'; '.join(changed[:8])}); "
            "choose another run.dir or give the saved values"
        )


def check_kernels(config: Config) -> None:
    """Triton on a CPU is for tests, and is asked for in so many words."""
    import torch

    from megasora.kernels.launch import INTERPRETED

    on_gpu = config.run.device == "cuda" or (config.run.device == "auto" and torch.cuda.is_available())
    if config.model.kernels == "triton" and not on_gpu and not INTERPRETED:
        raise MegaSoraError(
            "model.kernels=triton needs a GPU, and this run has none; use model.kernels=auto, or set "
            "TRITON_INTERPRET=1 in the environment, and Triton interprets the kernels, a thousand times slower"
        )


def check_parallel(config: Config) -> None:
    """Everything about the layout that can be known before a process group or a weight exists."""
    from megasora.checkpoint.store import MANIFEST
    from megasora.parallel.layout import check_layout
    from megasora.parallel.world import world_size

    check_layout(config, world_size())
    weights = Path(config.model.weights)
    if config.model.weights and not weights.is_file() and not (weights / MANIFEST).is_file():
        raise MegaSoraError(
            f"model.weights={config.model.weights} is no file and no checkpoint; give a safetensors file, a folder "
            "RUN/checkpoints/step-XXXXXXXX, or leave it empty"
        )


def check_data(config: Config) -> None:
    """Everything about the data that can be known before a process group or a weight exists."""
    from megasora.build import patch_dim
    from megasora.codec import build_codec
    from megasora.data.mixture import open_mixture
    from megasora.data.shards import check_fingerprints
    from megasora.text import build_text_encoder

    if not config.data.shards and not config.data.mixture:
        raise MegaSoraError(
            "data.shards is not set; give the folder that `megasora ingest` wrote: data.shards=data/shards"
        )
    clips = open_mixture(config.data, "train")
    open_mixture(config.data, "val")
    manifest, folder = clips.manifest, clips.datasets[0].folder
    codec, encoder = build_codec(config.codec), build_text_encoder(config.text)
    check_fingerprints(manifest, folder, codec.fingerprint, encoder.fingerprint, list(config.data.patch))
    if manifest.patch_dim != patch_dim(config):
        raise MegaSoraError(f"{folder} has tokens of {manifest.patch_dim} numbers, this run {patch_dim(config)}")
    check_same_data(config, clips)


def check_same_data(config: Config, clips: Mixture) -> None:
    """The clips of a run are those that it began with: a cursor is a place in a plan that is made of them."""
    from megasora.checkpoint.store import CheckpointStore
    from megasora.trainer import STATE_FILE

    newest = CheckpointStore(Path(config.run.dir) / "checkpoints").newest()
    if newest is None:
        return
    try:
        saved = json.loads((newest / STATE_FILE).read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # damaged: what is wrong is told when the checkpoint is loaded
    ours = clips.identity()
    changed = [f"{key}: {saved.get(key)} -> {value}" for key, value in ours.items() if saved.get(key) != value]
    if changed:
        raise MegaSoraError(
            f"{newest} was trained on other clips ({'; '.join(changed)}); give the shards and weights that the run "
            "began with, or choose another run.dir"
        )


def train(config: Config, stop: StopSignal) -> None:
    import torch

    from megasora.observe.launches import begin_launch, note_exit
    from megasora.observe.rank_log import rank_log
    from megasora.observe.watchdog import Watchdog
    from megasora.parallel.mesh import build_mesh
    from megasora.parallel.world import join_world
    from megasora.trainer import Trainer

    with join_world(config.run.device) as world:
        torch.set_num_threads(config.run.threads or max(1, (os.cpu_count() or 1) // world.local_size))
        check_same_configuration(config, world)
        run = Path(config.run.dir)
        watchdog = Watchdog(run, world.rank, world.size, config.run.hang_seconds, stop.requested)
        with alone(run, world), rank_log(run, world.rank), watchdog.watching():
            if world.is_main:
                begin_launch(run, world.size)
            world.barrier()  # from here on exit.json is of this launch
            try:
                mesh = build_mesh(config.parallel, world.device.type)
                Trainer(config, world, mesh, stop.requested, watchdog.moved).run()
            except (MegaSoraError, OSError) as error:
                note_exit(run, getattr(error, "exit_code", CRASH), str(error), world.rank)
                raise
            except Exception as error:
                traceback.print_exc()  # into the log of this process
                note_exit(run, CRASH, f"{type(error).__name__}: {error}".splitlines()[0], world.rank)
                sys.exit(CRASH)
            if world.is_main:
                note_exit(run, DONE, f"{config.run.steps} steps", world.rank)


@contextmanager
def alone(run: Path, world: World) -> Iterator[None]:
    """The main process holds the run folder: one launch at a time writes into it, whatever it was started by."""
    from megasora.files import locked

    with ExitStack() as held:
        problem = None
        if world.is_main:
            try:
                run.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(run / ".lock", f"run.dir={run}"))
            except MegaSoraError as error:
                problem = str(error)
        problem = world.from_main(problem)
        if problem:
            raise MegaSoraError(problem)
        yield


def check_same_configuration(config: Config, world: World) -> None:
    """Ranks that were started with different settings would train nothing, or hang."""
    everyone = world.gather(config)
    problem = None
    for rank, other in enumerate(everyone or ()):
        changed = differences(other, config)
        if changed and problem is None:
            problem = (
                f"process {rank} was started with another configuration than process 0 ({'; '.join(changed[:8])}); "
                "give all processes the same file and the same settings"
            )
    problem = world.from_main(problem)
    if problem:
        raise MegaSoraError(problem)


if __name__ == "__main__":
    sys.exit(main())
