"""The processes of torchrun that sample together: their layout, the model on it, and who writes.

    torchrun --nproc-per-node 4 -m megasora.sample RUN ... parallel.tensor=2 parallel.context=2

The layout is that of the command, not that of the training: a `parallel.*` that is not given is the default. Data
ranks, of which there are processes / (pipeline x context x tensor), sample clips of their own; the others share packs.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megasora.config import Config, load
from megasora.parallel.launcher import Launcher, check_meeting_point, die_with_launcher

if TYPE_CHECKING:
    from megasora.parallel.denoiser import Denoiser
    from megasora.parallel.mesh import Mesh
    from megasora.parallel.world import World
    from megasora.placement import WeightSource

MAX_WAIT_SECONDS = 3600.0  # of a process for the others, e.g. while one of them writes a long video


@dataclass(frozen=True)
class SamplingRanks:
    """This process among those that sample."""

    world: World
    mesh: Mesh
    denoiser: Denoiser

    @property
    def data_rank(self) -> int:
        return self.mesh.data.rank

    @property
    def data_size(self) -> int:
        """Number of groups of processes with packs of their own."""
        return self.mesh.data.size

    @property
    def is_writer(self) -> bool:
        """Whether this process, of those that share its packs, writes files."""
        return self.mesh.model.rank == 0 and self.mesh.context.rank == 0

    def barrier(self) -> None:
        """Waits for the processes that share packs with this one."""
        import torch.distributed as dist

        device = self.world.device
        for axis in (self.mesh.model, self.mesh.context):  # a process that is through the first speaks for its group
            dist.barrier(axis.group, device_ids=[device.index] if device.type == "cuda" else None)


def sampling_config(config: Config, overrides: Sequence[str]) -> Config:
    """The settings of a run, with the `parallel.*` among `overrides` and the dtype of sampling in place of those of its
    training."""
    parallel = load(None, [text for text in overrides if text.startswith("parallel.")]).parallel
    return dataclasses.replace(config, parallel=parallel, run=dataclasses.replace(config.run, dtype="auto"))


@contextmanager
def sampling_ranks(config: Config, launcher: Launcher, weights: WeightSource) -> Iterator[SamplingRanks]:
    """Joins the other processes of a launch and builds the model on their layout, `config.parallel`.

    `weights` are read once on each machine. Raises MegaSoraError where the layout does not fit the processes or the
    model, or a process does not come.
    """
    import torch

    from megasora.parallel.layout import check_sampling_layout
    from megasora.parallel.mesh import build_mesh
    from megasora.parallel.rendezvous import Rendezvous
    from megasora.parallel.shared_reads import shared_reads
    from megasora.parallel.world import init_distributed
    from megasora.parallelize import build_denoiser

    check_sampling_layout(config, launcher.size)
    check_meeting_point(launcher)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_launcher()
    torch.set_num_threads(config.run.threads or max(1, (os.cpu_count() or 1) // launcher.local_size))
    with init_distributed("auto", launcher, Rendezvous(launcher, MAX_WAIT_SECONDS)) as world:
        mesh = build_mesh(config.parallel, world.device.type)
        with shared_reads(weights, world, mesh.data_context) as shared:
            denoiser = build_denoiser(config, world.device, mesh, shared)
        yield SamplingRanks(world, mesh, denoiser)
