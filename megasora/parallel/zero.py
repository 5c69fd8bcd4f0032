"""ZeRO by DeepSpeed: optimizer states (stage 1), gradients (2) and weights (3) are partitioned over data x context.

Input: a model, or this rank's pipeline stages of one, and the packs of a step. Effect: one optimizer step, the same in
every layout up to the order of floating-point sums. It has two halves, gradients and update, so that a step can be left
out. DeepSpeed averages gradients over data x context; the loss is therefore multiplied by the number of those ranks.
Parameters whose gradient is partial on the tensor or pipeline axis have their own parameter groups: ZeRO partitions
them identically on all ranks of the axis, and this rank's partition of their reduced gradients is summed over that axis
before the optimizer step. Each rank then sums the squares of its partitions, once for each element of the model, and
one all-reduce makes the global norm of them; neither the norm nor the clipping waits on the host.

What a rank owns is returned as fragments: live views of its fp32 master weights and of Adam's moments. Checkpoints are
saved from these views and loaded into them, whatever layout saved them. Call `sync_after_load` after loading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megasora.config import Config, OptimConfig
from megasora.fragment import Fragment
from megasora.kernels.adamw import sum_of_squares
from megasora.parallel.adamw import ADAM_MOMENTS, PartitionAdamW, PartitionStep, Update
from megasora.parallel.collectives import all_reduce_sum
from megasora.parallel.context_attention import ContextAttention
from megasora.parallel.deepspeed_engine import build_deepspeed_engine
from megasora.parallel.deepspeed_optimizers import build_zero_adapter, local_shape
from megasora.parallel.layout import resolve_zero_stage
from megasora.parallel.mesh import Axis, Mesh
from megasora.parallel.muon import MatrixExchange, MatrixGroup, MuonAdamW, MuonRule
from megasora.parallel.pipeline import Loss, Pipeline
from megasora.parallel.world import World
from megasora.placement import Placement

CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_
UsesWeightDecay = Callable[[str, Tensor], bool]  # (name, parameter) -> whether weight decay applies


class ZeroEngine:
    """The local model stages in a DeepSpeed engine. A step is `forward_backward`, then `optimizer_step` or
    `discard_grads`; `predict` runs a forward pass without gradients. All ranks must call the same.

    stages             {stage number: module}; one, without a pipeline. A module is called with a pack. Parameters that
                       need no gradient are left out of training, fragments and counts. In stage 3 they may be divided
                       already, see `build_partitioner`
    placements         of all trained parameters of the stages, by name
    uses_weight_decay  (name, parameter) -> whether weight decay applies
    dtype              the model's: float32 or bfloat16; master weights, moments and gradient sums are fp32
    attention          of the model, over the context axis; None if it is not split
    muon               which parameters have Muon's steps, and how; None: all have AdamW's
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        placements: dict[str, Placement],
        uses_weight_decay: UsesWeightDecay,
        config: Config,
        world: World,
        mesh: Mesh,
        dtype: torch.dtype,
        attention: ContextAttention | None = None,
        muon: MuonRule | None = None,
    ):
        self.world, self.mesh, self.placements, self.attention = world, mesh, placements, attention
        self.pipeline: Pipeline | None = None  # set by `parallelize` where the pipeline axis is split
        self.notices: tuple[str, ...] = ()  # on what is slower than it was asked to be; set likewise
        self.plan_pack: Callable[[Any], Any] | None = None  # what the model computes of a pack on the CPU; set likewise
        self.module = next(iter(stages.values())) if len(stages) == 1 else nn.ModuleList(stages.values())
        self.module.to(world.device)
        named = [pair for stage in stages.values() for pair in stage.named_parameters()]
        self.parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        self.names = {parameter: name for name, parameter in self.parameters.items()}
        shaped = {name: torch.empty(local_shape(p), device="meta") for name, p in self.parameters.items()}
        num_matrices = {name: muon.num_matrices(name, x) if muon else 0 for name, x in shaped.items()}
        has_decay = {name: uses_weight_decay(name, x) for name, x in shaped.items()}
        groups = parameter_groups(self.parameters, placements, has_decay, num_matrices)
        self.partial_axes = [axes for _, _, axes in groups]  # of the gradients of each group
        check_same_groups(list(groups), mesh.model)
        self.max_grad_norm = config.optim.max_grad_norm
        self.optimizer = build_optimizer(groups, config.optim, muon)
        self.deepspeed = build_deepspeed_engine(self.module, self.optimizer, config, mesh, dtype)
        stage = resolve_zero_stage(config.parallel, world.device.type)
        axis = mesh.data_context
        self.zero = build_zero_adapter(self.deepspeed, stage, dtype, axis.rank, axis.size)
        self.set_matrices(groups, num_matrices)
        largest = max((p.numel() for name, p in self.parameters.items() if num_matrices[name]), default=0)
        self.zeros = torch.zeros(largest, device=world.device)  # the second moments of all of Muon's parameters
        for master in self.zero.master_partitions:
            self.optimizer.init_partition(master)
        self.counted = self.ranges_in_norm()
        self.grads: list[Tensor] = []  # of a step, parallel to the master partitions
        self.norm: Tensor | None = None  # of `grads`
        self.num_packs = config.data.packs_per_step // mesh.data.size  # of a step, on this data rank

    def set_matrices(self, groups: dict[tuple, list[nn.Parameter]], num_matrices: dict[str, int]) -> None:
        """Tells the optimizer of which matrices the partitions of Muon's groups consist."""
        for (is_muon, *_), parameters, master in zip(groups, groups.values(), self.zero.master_partitions, strict=True):
            if is_muon:
                owned = [self.zero.owned_range(parameter) for parameter in parameters]
                exchange = MatrixExchange([p.shape for p in parameters], owned, self.mesh.data_context)
                counts = [num_matrices[self.names[parameters[index]]] for index in exchange.indices]
                self.optimizer.matrices[master] = MatrixGroup(exchange, counts)

    @property
    def has_loss(self) -> bool:
        """Whether `forward_backward` calls `loss` on this rank."""
        return self.pipeline is None or self.pipeline.has_last_stage

    # ------------------------------------------------------------------ a step

    def forward_backward(
        self,
        packs: list[Any],
        loss: Loss,
        lap: Callable[[str], None] = lambda phase: None,
    ) -> Tensor:
        """Computes the gradients of this rank's packs and sums them over all ranks; returns their global norm before
        clipping, equal on all ranks: fp64, 0-dim, on the device; inf or NaN if an element is not finite. Changes no
        weight, and does not wait for the device.

        `packs`: data.packs_per_step / data ranks of them, else ValueError.
        `loss(prediction, pack index)`: this rank's summand of the global mean, a scalar; called on the last stage only.
        `lap(phase)`: called at the end of each phase: "forward" and "backward" of each pack, or with a pipeline one
        "backward" for both of all packs.
        """
        if len(packs) != self.num_packs:  # DeepSpeed would update the weights too early, or not at all
            raise ValueError(f"{len(packs)} packs in a step; data.packs_per_step / data ranks is {self.num_packs}")
        num_ranks = self.mesh.data_context.size  # DeepSpeed divides gradients by it
        if self.pipeline is not None:
            self.pipeline.forward_backward(packs, lambda prediction, index: loss(prediction, index) * num_ranks)
            self.zero.reduce_grads()
            lap("backward")
        else:
            for index, pack in enumerate(packs):
                value = loss(self.deepspeed(pack), index)
                lap("forward")
                self.deepspeed.backward(value * num_ranks, scale_wrt_gas=False)
                lap("backward")
                if index + 1 < len(packs):
                    self.deepspeed.step()  # counts the microbatch; no update before the last
        with torch.no_grad():
            self.grads = self.zero.flat_grads()
            self.sum_partial_gradients()
            self.norm = self.grad_norm()
        return self.norm

    @torch.no_grad()
    def optimizer_step(self, update: Update) -> None:
        """One update with the clipped gradients of `forward_backward`, which it drops; takes averages of the weights of
        `update.ema` along. Changes nothing, bit for bit, where `update.apply` is False or the norm is not finite."""
        apply = self.norm.isfinite()
        apply = apply if update.apply is None else apply & update.apply
        factor = (self.max_grad_norm / (self.norm + CLIP_EPS)).clamp(max=1.0).float()
        partitions = zip(self.zero.master_partitions, self.grads, self.zero.compute_partitions, strict=True)
        for index, (master, grad, compute) in enumerate(partitions):
            out = None if compute.data_ptr() == master.data_ptr() else compute.detach()
            group = self.optimizer.param_groups[self.zero.group_of(index)]
            self.optimizer.update_partition(group, PartitionStep(master, grad, out, factor, apply), update)
        self.grads, self.norm = [], None
        self.zero.finish_step()

    def discard_grads(self) -> None:
        """Leaves the step of `forward_backward` out: weights, moments and averages stay as they are."""
        self.grads, self.norm = [], None
        self.zero.discard_grads()

    def predict(self, packs: list[Any]) -> list[Any] | None:
        """Predictions of the last stage in evaluation mode; None on ranks of other stages."""
        self.module.eval()
        with torch.no_grad():
            if self.pipeline is not None:
                predictions = self.pipeline.forward_only(packs)
            else:
                predictions = [self.deepspeed(pack) for pack in packs]
        self.module.train()
        return predictions

    def sum_partial_gradients(self) -> None:
        """Sums the gradients that, after ZeRO's sum over data x context, are still partial on the tensor or pipeline
        axis."""
        for index, grad in enumerate(self.grads):
            for axis in self.partial_axes[self.zero.group_of(index)]:
                dist.all_reduce(grad, group=self.mesh.axis(axis).group)

    def grad_norm(self) -> Tensor:
        """The global norm of `grads`. All ranks must call it."""
        squares = [sum_of_squares(self.grads[i][start:end]) for i, start, end in self.counted]
        zero = torch.zeros((), dtype=torch.float64, device=self.world.device)
        return self.world.all_reduce_sum(torch.stack([zero, *squares]).sum()).sqrt()

    def ranges_in_norm(self) -> list[tuple[int, int, int]]:
        """(master partition, start, end) of the elements that this rank counts in the norm: those of parameters of
        which it has the primary replica."""
        owned = [self.zero.owned_range(p) for name, p in self.parameters.items() if self.is_primary_replica(name)]
        ranges: list[tuple[int, int, int]] = []
        for partition, start, end in sorted((o.partition, o.offset, o.offset + o.count) for o in owned if o):
            if ranges and ranges[-1][0] == partition and ranges[-1][2] == start:
                start = ranges.pop()[1]
            ranges.append((partition, start, end))
        return ranges

    # ------------------------------------------------------------------ weights

    def fragments(self) -> list[Fragment]:
        """What this rank owns of each parameter: master weights ("weights") and moments, changed by every step. Muon's
        parameters have no second moment: zeros."""
        fragments, axis = [], self.mesh.tensor
        for name, parameter in self.parameters.items():
            owned = self.zero.owned_range(parameter)
            if owned is not None:
                master, placement = self.zero.master_partitions[owned.partition], self.placements[name]
                state, part = self.optimizer.state[master], slice(owned.offset, owned.offset + owned.count)
                values = {"weights": master.detach()[part]}
                for kind in ADAM_MOMENTS:
                    values[kind] = state[kind][part] if kind in state else self.zeros[: owned.count]
                shape = placement.full_shape(local_shape(parameter), axis.size)
                fragments.append(Fragment(name, shape, placement, axis.rank, axis.size, owned.start, values))
        return fragments

    @torch.no_grad()
    def sync_after_load(self, updates: int) -> None:
        """Call on all ranks after loading a checkpoint into the fragments: copies the master weights to the compute
        weights. `updates`: the optimizer steps that it has had, which `optimizer_step` gets with each update."""
        self.zero.copy_masters_to_weights()

    def compute_weights(self) -> dict[str, Tensor]:
        """The weights that the model computes with, by name; in stage 3 this rank's flat partitions of them."""
        return {name: self.zero.compute_weight(parameter) for name, parameter in self.parameters.items()}

    def count_parameters(self) -> int:
        """The number of elements of all parameters of the full model; all ranks must call it."""
        primary = [p for name, p in self.parameters.items() if self.is_primary_replica(name)]
        count = torch.tensor(sum(local_shape(p).numel() for p in primary), device=self.world.device)
        return int(all_reduce_sum(count, self.mesh.model))

    def is_primary_replica(self, name: str) -> bool:
        return self.placements[name].is_primary_replica(self.mesh.pipeline.rank, self.mesh.tensor.rank)


def parameter_groups(
    parameters: dict[str, nn.Parameter],
    placements: dict[str, Placement],
    has_decay: dict[str, bool],
    num_matrices: dict[str, int],
) -> dict[tuple[bool, bool, tuple[str, ...]], list[nn.Parameter]]:
    """Parameters by (Muon or not, weight decay or not, axes over which their gradients are partial). In a group those
    that tensor ranks share come first: a rank then has few ranges of elements to count in the norm."""
    groups: dict[tuple[bool, bool, tuple[str, ...]], list[nn.Parameter]] = {}
    for name, parameter in sorted(parameters.items(), key=lambda pair: placements[pair[0]].shard_dim is None):
        key = num_matrices[name] > 0, has_decay[name], placements[name].partial_axes
        groups.setdefault(key, []).append(parameter)
    return dict(sorted(groups.items(), reverse=True))


def check_same_groups(keys: list[tuple], axis: Axis) -> None:
    """Raises RuntimeError if ranks of `axis` have different parameter groups: partial gradients are summed group by
    group."""
    by_rank: list = [None] * axis.size
    dist.all_gather_object(by_rank, keys, group=axis.group)
    if any(other != keys for other in by_rank):
        raise RuntimeError(f"ranks of the pipeline and tensor axes have different parameter groups: {by_rank}")


def build_optimizer(
    groups: dict[tuple, list[nn.Parameter]], config: OptimConfig, muon: MuonRule | None
) -> PartitionAdamW:
    """The optimizer of `parameter_groups`. DeepSpeed replaces its parameters by flat fp32 master partitions."""
    param_groups = [
        {"params": parameters, "weight_decay": config.weight_decay if has_decay else 0.0}
        for (_, has_decay, _), parameters in groups.items()
    ]
    adamw = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    if muon is None:
        return PartitionAdamW(param_groups, **adamw)
    return MuonAdamW(param_groups, muon.orthogonalize, config.muon_momentum, **adamw)
