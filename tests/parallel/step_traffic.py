"""What one training step of one rank sends: recorded, and as docs/parallel.md says in "What a step sends".

The step is `TrainingSteps.take` with a `DiTTask`, without data set, run folder and checkpoints. `ExpectedTraffic` has
the formulas of the table in the docs, one method per axis.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import layouts
import torch
import torch.distributed as dist
from torch import Tensor

from megasora.batch import VideoBatch
from megasora.config import Config
from megasora.data.loader import StepBatch
from megasora.optim.ema import ShardedEMA
from megasora.optim.ema_decays import ema_decays
from megasora.optim.step_guard import StepGuard
from megasora.parallel.context_split import received_tokens_per_rank, sent_tokens_per_rank
from megasora.parallel.mesh import Axis, Mesh
from megasora.parallel.pipeline import num_stages, rank_of_stage, stage_numbers
from megasora.parallel.zero import ZeroEngine
from megasora.run_log.slow_ranks import SlowRanks
from megasora.run_log.stopwatch import Stopwatch
from megasora.tasks.dit import DiTTask
from megasora.tasks.task import StepOutput
from megasora.testing.recorded_collectives import RecordedCollectives, Traffic, traffic
from megasora.training_steps import TrainingSteps

FP32 = torch.float32


class StepsWithoutRun(TrainingSteps):
    """Has what `TrainingSteps.take` reads; keeps what the ranks sum up."""

    def __init__(self, config: Config, task: DiTTask):
        self.config, self.world, self.task, self.step = config, task.world, task, 0
        weights = [f.values["weights"] for f in task.fragments()]
        self.state = SimpleNamespace(
            ema=ShardedEMA(weights, ema_decays(config.optim)),
            guard=StepGuard(config.optim),
            saver=SimpleNamespace(
                stage=0, progress=lambda: (0, 0), advance=lambda busy, failed: None
            ),  # nothing is saved
            checkpoints=SimpleNamespace(due=lambda step, must_save: None),
        )
        self.slow_ranks = SlowRanks(Path(config.run.dir), self.world.rank, self.world.size, None)
        self.stop_requested, self.stopping, self.matmul_flops_per_s = (lambda: False), False, None
        self.pending, self.reads_late, self.mean_seconds = None, False, 0.0

    def sum_over_ranks(self, batch: StepBatch, output: StepOutput) -> tuple[dict[str, Tensor], Tensor]:
        self.local_sums = output.sums
        return super().sum_over_ranks(batch, output)


@dataclass(frozen=True)
class RecordedStep:
    recorded: Counter[Traffic]
    expected: dict[Traffic, range]
    rows: set[tuple[str, str, str]]  # of the table in the docs that apply: (axis, op, dtype)
    axes: dict[str, tuple[int, ...]]  # global ranks of each axis of the mesh
    context_bytes_sent: int  # as counted by ContextAttention for metrics.jsonl


def record_step(config: Config) -> RecordedStep:
    """Records the second step of this rank.

    The first step also sends what is not sent at every step: votes of pipeline stages, ZeRO-3's check of its module
    order, the replica check.
    """
    task = layouts.build_task(config)
    mesh, steps = task.mesh, StepsWithoutRun(config, task)
    log = SimpleNamespace(log_step=lambda *_: None)
    for step in range(2):
        batch = layouts.build_step_batch(task, step)
        with RecordedCollectives() as recorded:
            steps.take(batch, Stopwatch(task.world.device), log)
    shares = [share.value.clean for share in batch.shares]
    expected = ExpectedTraffic(config, mesh, task.engine, shares)
    return RecordedStep(
        traffic(recorded.messages),
        expected.ranges,
        expected.rows,
        {name: ranks_of(axis) for name, axis in vars(mesh).items()},
        int(steps.local_sums["context_bytes_sent"]),
    )


def ranks_of(axis: Axis) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(axis.group))


class ExpectedTraffic:
    """Elements that one rank sends in a step, by the formulas of the docs: `ranges` holds the least and the most.

    They differ by the padding of DeepSpeed's buffers, and for ZeRO-3's weights by how long it keeps gathered ones.
    """

    def __init__(self, config: Config, mesh: Mesh, engine: ZeroEngine, packs: list[VideoBatch]):
        self.config, self.mesh, self.engine, self.packs = config, mesh, engine, packs
        self.dtype = getattr(torch, config.run.dtype)
        self.least: Counter[Traffic] = Counter()
        self.most: Counter[Traffic] = Counter()
        self.rows: set[tuple[str, str, str]] = set()
        p = config.parallel
        pipeline = (p.schedule if p.pipeline > 1 else "1f1b", p.pipeline, p.stages_per_rank)
        self.total_stages, self.local_stages = num_stages(*pipeline), stage_numbers(*pipeline, mesh.pipeline.rank)
        for pack in packs:
            self.tensor(pack)
            self.context(pack)
            self.pipeline(pack)
        self.partial_gradients()
        self.data_context()
        self.ranges = {key: range(self.least[key], self.most[key] + 1) for key in self.least}

    def add(self, axis: Axis, op: str, dtype: torch.dtype, elements: int, most: int | None = None) -> None:
        if axis.is_split:
            self.rows.add((axis.name, op, "compute" if dtype == self.dtype else "fp32"))
            key = Traffic(op, dtype, ranks_of(axis))
            self.least[key] += elements
            self.most[key] += elements if most is None else most

    def stage_rank(self, stage: int) -> int:
        return rank_of_stage(self.config.parallel.schedule, self.config.parallel.pipeline, stage)

    @property
    def local_blocks(self) -> int:
        return self.config.model.depth // self.total_stages * len(self.local_stages)

    @property
    def num_forwards(self) -> int:
        """Forward passes of a block per step; all blocks recompute, or none."""
        return 1 if self.config.model.recompute == "none" else 2

    # ------------------------------------------------------------------ axes

    def tensor(self, pack: VideoBatch) -> None:
        tokens, rows, text = len(pack.patches_LP), len(pack.timesteps_R), len(pack.text_SE)
        m, axis, c, f = self.config.model, self.mesh.tensor, self.dtype, self.num_forwards
        width, blocks = m.width, self.local_blocks
        self.add(axis, "all_gather", c, blocks * (3 * f + 6) * tokens * width)
        self.add(axis, "reduce_scatter", c, blocks * (3 * f + 3) * tokens * width)
        self.add(axis, "all_reduce", c, blocks * text * width)
        if m.qk_norm == "across_heads":
            self.add(axis, "all_reduce", FP32, blocks * (f + 1) * (3 * tokens + text))
        if m.modulation == "block":
            self.modulation(rows, 6, times=blocks, forwards=f)
        else:
            self.modulation(rows, 6, times=len(self.local_stages), forwards=1)
        if self.total_stages - 1 in self.local_stages:
            self.add(axis, "all_gather", c, tokens * layouts.PATCH_DIM)
            if m.modulation == "block":
                self.modulation(rows, 2, times=1, forwards=1)
            else:
                self.add(axis, "all_reduce", c, rows * width)

    def modulation(self, rows: int, vectors: int, times: int, forwards: int) -> None:
        """A projection of the conditioning to `vectors` vectors per row, whose output is gathered."""
        axis, width = self.mesh.tensor, self.config.model.width
        self.add(axis, "all_gather", self.dtype, times * forwards * rows * vectors * width)
        self.add(axis, "reduce_scatter", self.dtype, times * rows * vectors * width)
        self.add(axis, "all_reduce", self.dtype, times * rows * width)

    def context(self, pack: VideoBatch) -> None:
        split, tokens, p = pack.context_split, len(pack.patches_LP), self.config.parallel
        ring, ulysses, blocks = self.mesh.ring, self.mesh.ulysses, self.local_blocks
        width = self.config.model.width // p.tensor
        passes = 3 if self.config.model.recompute == "full" else 2  # in which keys are sent
        for op, tokens_per_rank, other in (("send", sent_tokens_per_rank, received_tokens_per_rank),
                                           ("recv", received_tokens_per_rank, sent_tokens_per_rank)):  # fmt: skip
            elements = 2 * blocks * width // p.ulysses
            self.add(ring, op, self.dtype, passes * elements * int(tokens_per_rank(split)[ring.rank]))
            self.add(ring, op, FP32, elements * int(other(split)[ring.rank]))
        self.add(ulysses, "all_to_all", self.dtype, blocks * 4 * (self.num_forwards + 1) * tokens * width)

    def pipeline(self, pack: VideoBatch) -> None:
        hidden = len(pack.patches_LP) // self.config.parallel.tensor * self.config.model.width
        axis = self.mesh.pipeline
        for stage in self.local_stages:
            for neighbour in (stage - 1, stage + 1):  # tokens from one and to the other, gradients the other way
                if 0 <= neighbour < self.total_stages and self.stage_rank(neighbour) != axis.rank:
                    self.add(axis, "send", self.dtype, hidden)
                    self.add(axis, "recv", self.dtype, hidden)

    def partial_gradients(self) -> None:
        zero_size = self.mesh.data_context.size
        for name, placement in self.engine.placements.items():
            least = self.local_elements(name) // zero_size
            for axis in placement.partial_axes:
                self.add(self.mesh.axis(axis), "all_reduce", FP32, least, least + 2 * zero_size)

    def data_context(self) -> None:
        axis, stage, packs = self.mesh.data_context, self.config.parallel.zero_stage, len(self.packs)
        n = sum(map(self.local_elements, self.engine.parameters))
        padding = 2 * axis.size * len(self.engine.parameters)
        if stage < 3:
            times = packs if stage == 2 else 1
            self.add(axis, "all_reduce", FP32, times * n, times * (n + padding))
            self.add(axis, "all_gather", self.dtype, n, n + padding)
        else:
            self.add(axis, "reduce_scatter", FP32, packs * n, packs * (n + padding))
            self.add(axis, "all_gather", self.dtype, n, (2 * packs + 1) * (n + padding))

    def local_elements(self, name: str) -> int:
        parameter = self.engine.parameters[name]
        return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 parameters are empty between uses
