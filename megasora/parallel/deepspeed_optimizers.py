"""Adapters to the private state of DeepSpeed's ZeRO optimizers, one for each optimizer class that DeepSpeed may choose.

    Bf16Stage1    BF16_Optimizer                  stage 1 in bf16: full fp32 gradients, one flat tensor per group
    Stage1And2    DeepSpeedZeroOptimizer          stage 1 in fp32, stage 2: this rank's partition of the gradients
    Stage2Alone   the same                        stage 2 in bf16 without other ranks
    Stage3        DeepSpeedZeroOptimizer_Stage3   stage 3: parameters are partitioned too

DeepSpeed has no public interface to the fp32 master weights, to the reduced gradients before the optimizer step, or to
the position of a parameter in them. Every private name of DeepSpeed (0.19) that is used is in this file only.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OwnedRange:
    """The elements of a parameter whose master weights this rank owns."""

    start: int  # in the flattened local tensor
    count: int
    partition: int  # index in `master_partitions`
    offset: int  # of the first element in that partition


class ZeroAdapter(ABC):
    """What `ZeroEngine` uses of DeepSpeed's optimizer. The methods with a body are those of stages 1 and 2, where every
    rank of data x context has the full parameters.

    A step is `flat_grads` after the last backward pass, then the update of the master partitions and of the compute
    partitions by the caller, and `finish_step`; or `flat_grads`, then `discard_grads`. DeepSpeed's own step is left
    out: it clips and copies in passes of their own, and waits on the host for the gradient norm.
    """

    def __init__(self, engine: Any):  # a DeepSpeedEngine
        self.engine, self.optimizer = engine, engine.optimizer

    @property
    @abstractmethod
    def master_partitions(self) -> list[Tensor]:
        """This rank's fp32 master weights, flat: one tensor per parameter group, in stage 3 per sub-group."""

    @property
    @abstractmethod
    def compute_partitions(self) -> list[Tensor]:
        """The same elements of the weights that the model computes with, each as long as its master partition."""

    def group_of(self, partition: int) -> int:
        """Index of the parameter group that a master partition belongs to."""
        return partition

    @abstractmethod
    def flat_grads(self) -> list[Tensor]:
        """fp32 gradients, parallel to the master partitions, summed over data x context; zeros in their padding. Call
        it once, after the last backward pass of a step; valid until the step ends."""

    def finish_step(self) -> None:
        """Ends a step whose compute partitions have been updated: sends them to the other ranks and drops the
        gradients. All ranks must call it."""
        self.clear_grads()
        self.gather_weights()
        self.count_step()

    def discard_grads(self) -> None:
        """Ends a step: drops the gradients, changes no weight."""
        self.clear_grads()
        self.count_step()

    def count_step(self) -> None:
        """DeepSpeed's counts of steps and microbatches."""
        nothing = lambda *_, **__: None  # noqa: E731
        with replaced(self.optimizer, step=nothing, zero_grad=nothing):
            self.engine.step()

    @abstractmethod
    def gather_weights(self) -> None:
        """Sends the compute partitions of each rank to all others; all ranks must call it."""

    @abstractmethod
    def clear_grads(self) -> None:
        """Drops the gradients of the step, also those that are to be accumulated further."""

    def owned_range(self, parameter: nn.Parameter) -> OwnedRange | None:
        """None where this rank owns no element of the parameter."""
        mapping = parameter._hp_mapping
        if mapping is None or mapping.lp_fragment_address.numel == 0:
            return None
        local, master = mapping.lp_fragment_address, mapping.hp_fragment_address
        return OwnedRange(local.start, local.numel, mapping.param_group_index, master.start)

    def copy_masters_to_weights(self) -> None:
        """Sets the weights that the model computes with from the master weights; all ranks must call it."""
        self.optimizer.update_lp_params()

    def compute_weight(self, parameter: nn.Parameter) -> Tensor:
        """The weight that the model computes with; in stage 3 this rank's flat partition of it."""
        return parameter

    def gather_flat_weights(self, flat: list[Tensor], partitions: list[list[Tensor]]) -> None:
        """DeepSpeed's all-gather of the flat weights of each group, whose partitions by rank are views of them."""
        module_of(self.optimizer).all_gather_dp_groups(
            groups_flat=flat,
            partitioned_param_groups=partitions,
            dp_process_group=self.optimizer.real_dp_process_group,
            start_alignment_factor=self.optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=self.optimizer.allgather_bucket_size,
        )


class PipelineZeroAdapter(ZeroAdapter):
    """Of the optimizers that DeepSpeed chooses in stage 1, which a pipeline needs (`check_layout`)."""

    @abstractmethod
    def accumulate_grads(self, stage: nn.Module) -> None:
        """Adds the `.grad` of one microbatch of a pipeline to the sums over microbatches."""

    @abstractmethod
    def reduce_grads(self) -> None:
        """Sums the gradients over data x context, after all microbatches of a pipeline."""


class Bf16Stage1(PipelineZeroAdapter):
    """BF16_Optimizer: every rank has all gradients in fp32, and adds the bf16 gradients of each microbatch to them."""

    def __init__(self, engine: Any, rank: int):
        super().__init__(engine)
        self.rank = rank  # on data x context
        vars(self.optimizer)["_update_hp_grad"] = self.add_grad

    @property
    def master_partitions(self) -> list[Tensor]:
        return self.optimizer.fp32_groups_flat_partition

    @property
    def compute_partitions(self) -> list[Tensor]:
        return [partitions[self.rank] for partitions in self.optimizer.bf16_partitioned_groups]

    def add_grad(self, parameter: nn.Parameter, group: int, index: int, clear_lp_grads: bool = False) -> None:
        """In place of DeepSpeed's, which converts the gradient to fp32 in a pass and adds it in another."""
        if parameter.grad is not None:
            with torch.no_grad():
                self.optimizer.fp32_groups_gradients[group][index].add_(parameter.grad.view(-1))

    def flat_grads(self) -> list[Tensor]:
        return self.optimizer.fp32_groups_gradient_flat_partition

    def gather_weights(self) -> None:
        self.gather_flat_weights(self.optimizer.bf16_groups_flat, self.optimizer.bf16_partitioned_groups)

    def clear_grads(self) -> None:
        self.optimizer.zero_grad()

    def accumulate_grads(self, stage: nn.Module) -> None:
        self.optimizer.update_hp_grads()
        for parameter in stage.parameters():
            parameter.grad = None

    def reduce_grads(self) -> None:
        self.engine.buffered_allreduce_fallback()


class Stage1And2(PipelineZeroAdapter):
    """DeepSpeedZeroOptimizer: a rank has its partition of the reduced gradients."""

    def __init__(self, engine: Any, rank: int):
        super().__init__(engine)
        self.rank = rank  # on data x context
        if self.optimizer.overlap_comm:
            self.reduce_last_bucket = self.optimizer.independent_gradient_partition_epilogue
            vars(self.optimizer)["independent_gradient_partition_epilogue"] = self.finish_reduction

    def finish_reduction(self) -> None:
        """In place of DeepSpeed's end of a backward pass, where the host waits for the device: the stream of the
        computation waits for that of the reductions."""
        self.optimizer.reduce_ipg_grads()
        torch.cuda.current_stream().wait_stream(self.optimizer.reduction_stream)
        with replaced(self.optimizer, overlap_comm=False, reduce_ipg_grads=lambda *_: None):
            self.reduce_last_bucket()

    @property
    def master_partitions(self) -> list[Tensor]:
        return self.optimizer.single_partition_of_fp32_groups

    @property
    def compute_partitions(self) -> list[Tensor]:
        return [partitions[self.rank] for partitions in self.optimizer.parallel_partitioned_bit16_groups]

    def flat_grads(self) -> list[Tensor]:
        optimizer, grads = self.optimizer, []
        for index in range(len(self.master_partitions)):
            parts = optimizer.averaged_gradients[index]
            flat = getattr(parts, "flat_partition", None)  # there is one where the model is not in fp32
            grads.append(torch.cat([part.reshape(-1) for part in parts]) if flat is None else flat)
            optimizer.averaged_gradients[index] = optimizer.all_grad_tensors[index] = None
        optimizer.zero_grad()
        return grads

    def gather_weights(self) -> None:
        self.gather_flat_weights(self.optimizer.bit16_groups_flat, self.optimizer.parallel_partitioned_bit16_groups)

    def clear_grads(self) -> None:
        self.optimizer.micro_step_id = module_of(self.optimizer).INITIAL_MICRO_STEP_ID

    def accumulate_grads(self, stage: nn.Module) -> None:
        """Nothing: a pipeline uses this class in fp32 only, where `.grad` itself is the sum."""

    def reduce_grads(self) -> None:
        self.optimizer.set_gradient_accumulation_boundary(True)
        self.optimizer.reduce_gradients(pipeline_parallel=True)


class Stage2Alone(Stage1And2):
    """DeepSpeedZeroOptimizer in bf16 with one rank of data x context: nothing is reduced, so the gradient of a pack is
    added to the fp32 sums in one pass, and DeepSpeed's buckets are not used."""

    def __init__(self, engine: Any, rank: int):
        super().__init__(engine, rank)
        self.sums: list[Tensor] = []  # flat fp32 gradients of each group
        self.has_grad: set[nn.Parameter] = set()  # those with a gradient in `sums`
        own = {"process_gradients": self.add_grad, "independent_gradient_partition_epilogue": self.finish_backward}
        vars(self.optimizer).update(own)

    @torch.no_grad()
    def add_grad(self, parameter: nn.Parameter, group: int) -> None:
        if not self.sums:
            self.sums = [torch.empty_like(master, requires_grad=False) for master in self.master_partitions]
        part = self.part_of(parameter, group)
        if parameter in self.has_grad:
            part.add_(parameter.grad.view(-1))
        else:
            part.copy_(parameter.grad.view(-1))
            self.has_grad.add(parameter)
        parameter.grad = None

    def part_of(self, parameter: nn.Parameter, group: int) -> Tensor:
        offset = self.optimizer.grad_partition_insertion_offset[group][0][self.optimizer.get_param_id(parameter)]
        return self.sums[group].narrow(0, offset, parameter.numel())

    def finish_backward(self) -> None:
        self.optimizer._epilogue_ran_this_backward = True

    def flat_grads(self) -> list[Tensor]:
        for group, (parameters, sums) in enumerate(zip(self.optimizer.bit16_groups, self.sums, strict=True)):
            for parameter in parameters:
                if parameter not in self.has_grad:
                    self.part_of(parameter, group).zero_()
            sums[sum(parameter.numel() for parameter in parameters) :].zero_()  # the padding
        self.has_grad.clear()
        grads, self.sums = self.sums, []
        return grads


class Stage3(ZeroAdapter):
    """DeepSpeedZeroOptimizer_Stage3: a rank has its partition of each parameter; groups are split into sub-groups."""

    def __init__(self, engine: Any, rank: int):
        super().__init__(engine)
        self.rank = rank  # on data x context

    @property
    def master_partitions(self) -> list[Tensor]:
        return self.optimizer.fp32_partitioned_groups_flat

    @property
    def compute_partitions(self) -> list[Tensor]:
        return self.optimizer.fp16_partitioned_groups_flat

    def group_of(self, partition: int) -> int:
        return self.optimizer.sub_group_to_group_id[partition]

    def flat_grads(self) -> list[Tensor]:
        """Views of DeepSpeed's buffer, in which the partitions of a sub-group follow each other."""
        sizes = [master.numel() for master in self.master_partitions]
        return list(self.optimizer.grad_partitions_flat_buffer.split(sizes))

    def gather_weights(self) -> None:
        for partition in range(len(self.master_partitions)):
            self.optimizer._unflatten_partitioned_parameters(partition)
        self.optimizer._post_step(set())  # gathers the small ones

    def clear_grads(self) -> None:
        self.optimizer._pre_step()
        self.optimizer._partition_all_parameters()
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.averaged_gradients = {}

    def owned_range(self, parameter: nn.Parameter) -> OwnedRange | None:
        partition, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        start, count = self.partition_range(parameter)
        return OwnedRange(start, count, partition, offset) if count else None

    def copy_masters_to_weights(self) -> None:
        self.optimizer.checkpoint_event_prologue()  # partitions parameters that are gathered
        for partition in range(len(self.master_partitions)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(partition)
        self.optimizer.checkpoint_event_epilogue()  # gathers the small ones again

    def compute_weight(self, parameter: nn.Parameter) -> Tensor:
        _, count = self.partition_range(parameter)
        return parameter.ds_tensor.narrow(0, 0, count)

    def partition_range(self, parameter: nn.Parameter) -> tuple[int, int]:
        """(start, count) of this rank's partition of the flattened parameter, without padding."""
        size = parameter.ds_tensor.ds_numel
        start = min(size * self.rank, parameter.ds_numel)
        return start, min(size, parameter.ds_numel - start)


def build_zero_adapter(engine: Any, stage: int, dtype: torch.dtype, rank: int, size: int) -> ZeroAdapter:
    """The adapter to the optimizer that DeepSpeed chooses for a ZeRO stage and dtype; `rank` of `size` ranks: on
    data x context."""
    if stage == 3:
        return Stage3(engine, rank)
    if stage == 1 and dtype == torch.bfloat16:
        return Bf16Stage1(engine, rank)
    is_alone = stage == 2 and size == 1 and dtype != torch.float32
    return (Stage2Alone if is_alone else Stage1And2)(engine, rank)


def module_of(optimizer: Any) -> Any:
    """The module that defines the optimizer's class."""
    return sys.modules[type(optimizer).__module__]


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Within the context, attributes of a module or of an instance have these values."""
    own = vars(owner)
    saved = {name: own[name] for name in values if name in own}  # a method of the class is not among them
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            del own[name]
        own.update(saved)


def local_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the parameter on this tensor rank; in stage 3 the parameter itself is empty between uses."""
    return getattr(parameter, "ds_shape", parameter.shape)
