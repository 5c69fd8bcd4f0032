"""`python -m megasora.train CONFIG [key=value ...]`, alone or under torchrun: trains a run, or goes on with it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megasora.config import Config, differences, load
from megasora.errors import MegaSoraError

if TYPE_CHECKING:
    from megasora.parallel.world import World

# what may change between two launches of one run without changing what is trained
FREE_KEYS = (
    "run.dir", "run.device", "run.threads", "data.shards", "data.prefetch", "ingest", "checkpoint", "validation",
    "sample", "evaluation", "wandb", "run.debug_parallel", "run.debug_every",
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
        config = load(arguments[0], arguments[1:])
        check_run_folder(config)
        check_parallel(config)
        check_data(config)
        train(config)
        return 0
    except (MegaSoraError, OSError) as error:  # no space, no permission: the system's words name the file
        rank = int(os.environ.get("RANK", "0"))
        if rank > 0:  # let the main process say it: the launcher ends the others as soon as one is gone
            time.sleep(OTHERS_WAIT_SECONDS)
        print(f"megasora: error: {error}" + (f" (process {rank})" if rank else ""), file=sys.stderr, flush=True)
        return 2


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


def check_parallel(config: Config) -> None:
    """Everything about the layout that can be known before a process group or a weight exists."""
    from megasora.parallel.layout import check_layout
    from megasora.parallel.world import world_size

    check_layout(config, world_size())
    if config.model.weights and not Path(config.model.weights).is_file():
        raise MegaSoraError(
            f"model.weights={config.model.weights} is no file; give a safetensors file, or leave it empty"
        )


def check_data(config: Config) -> None:
    """Everything about the data that can be known before a process group or a weight exists."""
    from megasora.build import patch_dim
    from megasora.codec import build_codec
    from megasora.data.loader import PackLoader
    from megasora.data.shards import Shards, check_fingerprints
    from megasora.text import build_text_encoder

    if not config.data.shards:
        raise MegaSoraError(
            "data.shards is not set; give the folder that `megasora ingest` wrote: data.shards=data/shards"
        )
    folder = Path(config.data.shards)
    shards = Shards.open(folder, "train")
    encoder = build_text_encoder(config.text)
    check_fingerprints(
        shards.manifest, folder, build_codec(config.codec).fingerprint, encoder.fingerprint, list(config.data.patch)
    )
    if shards.manifest.patch_dim != patch_dim(config):
        raise MegaSoraError(f"{folder} has tokens of {shards.manifest.patch_dim} numbers, this run {patch_dim(config)}")
    PackLoader(shards, config.data, config.run.seed, None)


def train(config: Config) -> None:
    import torch

    from megasora.parallel.mesh import build_mesh
    from megasora.parallel.world import join_world
    from megasora.trainer import Trainer

    with join_world(config.run.device) as world:
        torch.set_num_threads(config.run.threads or max(1, (os.cpu_count() or 1) // world.local_size))
        check_same_configuration(config, world)
        Trainer(config, world, build_mesh(config.parallel, world.device.type)).run()


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
