"""`python -m megasora.train_codec [--check] CONFIG [key=value ...]`, alone or under torchrun: trains a video codec.

Run folder, resume, stop, exit codes and --check are those of megasora.train. At the end RUN/codec/ is the codec that
`megasora ingest`, `megasora sample` and `codec.path` take.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from megasora.checks import check_codec_run, resolve_network
from megasora.config import Config
from megasora.train import Training
from megasora.train import main as train_main

if TYPE_CHECKING:
    from megasora.parallel.mesh import Mesh
    from megasora.parallel.world import World
    from megasora.tasks.task import Task

EXAMPLE = (
    "torchrun --nproc-per-node 2 -m megasora.train_codec configs/vae_demo.yaml run.dir=runs/vae data.clips=data/clips"
)


def main(arguments: list[str] | None = None) -> int:
    help_text = f"{__doc__}\n\nExample: {EXAMPLE}"
    return train_main(arguments, Training(help_text, resolve_network, check_codec_run, build_task))


def build_task(config: Config, world: World, mesh: Mesh) -> Task:
    from megasora.tasks.codec import CodecTask

    return CodecTask(config, world, mesh)


if __name__ == "__main__":
    sys.exit(main())
