"""Adapters to the private state of DeepSpeed's ZeRO optimizers, one for each optimizer class that DeepSpeed may choose.

    Bf16Stage1    BF16_Optimizer                  stage 1 in bf16: full fp32 gradients, one flat tensor per group
    Stage1And2    DeepSpeedZeroOptimizer          stage 1 in fp32, stage 2: this rank's partition of the gradients
    Stage3        DeepSpeedZeroOptimizer_Stage3   stage 3: parameters are partitioned too

DeepSpeed has no public interface to the fp32 master weights, to the reduced gradients and their norm before the
optimizer step, or to the position of a parameter in them. Every private name of DeepSpeed (0.19) that is used is in
this file only.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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
    rank of data x context has the full parameters."""

    def __init__(self, engine: Any):  # a DeepSpeedEngine
        self.engine, self.optimizer = engine, engine.optimizer

    @property
    @abstractmethod
    def master_partitions(self) -> list[Tensor]:
        """This rank's fp32 master weights, flat: one tensor per parameter group, in stage 3 per sub-group."""

    @abstractmethod
    def reduced_grads(self) -> list[tuple[list[nn.Parameter], list[Tensor]]]:
        """(parameters, fp32 gradients) by group, as in `master_partitions`, summed over data x context before the step:
        this rank's partition of them, or all with `Bf16Stage1`. Writing to them changes the step."""

    def grad_norm(self) -> float:
        """The global norm of the reduced gradients, before clipping, equal on all ranks; inf if an element is not
        finite. All ranks must call it, once before `step` or `discard_grads`."""
        self.norm = self.reduce_grad_norm()
        value = float(self.total_norm(self.norm))
        return value if 0 <= value < math.inf else math.inf  # DeepSpeed writes -1 for what is not finite

    def step(self) -> None:
        """Clips the gradients to the norm that `grad_norm` has computed, and updates weights and moments."""
        with self.known_norm(self.norm):
            self.engine.step()

    def discard_grads(self) -> None:
        """Ends the step without an update, as DeepSpeed does after an overflow: clears gradients, changes no state."""
        with self.known_overflow():
            self.engine.step()

    @abstractmethod
    def reduce_grad_norm(self) -> Any:
        """What DeepSpeed's step computes of the gradients first, with all its collectives."""

    def total_norm(self, norm: Any) -> Tensor:
        """The global norm, of what `reduce_grad_norm` has returned."""
        return norm

    @abstractmethod
    def known_norm(self, norm: Any) -> AbstractContextManager:
        """Within the context, DeepSpeed's step uses `norm` and does not compute it again."""

    @abstractmethod
    def known_overflow(self) -> AbstractContextManager:
        """Within the context, DeepSpeed's step finds an overflow and computes nothing."""

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

    @property
    def master_partitions(self) -> list[Tensor]:
        return self.optimizer.fp32_groups_flat_partition

    def reduced_grads(self) -> list[tuple[list[nn.Parameter], list[Tensor]]]:
        grads = [[flat] for flat in self.optimizer.fp32_groups_gradients_flat]
        return list(zip(self.optimizer.bf16_groups, grads, strict=True))

    def reduce_grad_norm(self) -> Tensor:
        grads, _ = self.optimizer.get_grads_for_norm()
        return module_of(self.optimizer).get_global_norm_of_tensors(
            input_tensors=grads, mpu=self.optimizer.mpu, norm_type=self.optimizer.norm_type
        )

    def known_norm(self, norm: Any) -> AbstractContextManager:
        return replaced(module_of(self.optimizer), get_global_norm_of_tensors=lambda **_: norm)

    def known_overflow(self) -> AbstractContextManager:
        return self.known_norm(math.inf)

    def accumulate_grads(self, stage: nn.Module) -> None:
        self.optimizer.update_hp_grads()
        for parameter in stage.parameters():
            parameter.grad = None

    def reduce_grads(self) -> None:
        self.engine.buffered_allreduce_fallback()


class Stage1And2(PipelineZeroAdapter):
    """DeepSpeedZeroOptimizer: a rank has its partition of the reduced gradients."""

    @property
    def master_partitions(self) -> list[Tensor]:
        return self.optimizer.single_partition_of_fp32_groups

    def reduced_grads(self) -> list[tuple[list[nn.Parameter], list[Tensor]]]:
        groups = self.optimizer.bit16_groups
        return [(group, list(self.optimizer.averaged_gradients[i])) for i, group in enumerate(groups)]

    def reduce_grad_norm(self) -> Tensor:
        return self.optimizer.scaled_global_norm()

    def known_norm(self, norm: Any) -> AbstractContextManager:
        return replaced(self.optimizer, scaled_global_norm=lambda: norm)

    def known_overflow(self) -> AbstractContextManager:
        def find_overflow(**_: Any) -> None:
            self.optimizer.overflow = True

        return replaced(self.optimizer, check_grad_overflow=True, check_overflow=find_overflow)

    def accumulate_grads(self, stage: nn.Module) -> None:
        """Nothing: a pipeline uses this class in fp32 only, where `.grad` itself is the sum."""

    def reduce_grads(self) -> None:
        self.optimizer.set_gradient_accumulation_boundary(True)
        self.optimizer.reduce_gradients(pipeline_parallel=True)


class Stage3(ZeroAdapter):
    """DeepSpeedZeroOptimizer_Stage3: a rank has its partition of each parameter; groups are split into sub-groups."""

    def __init__(self, engine: Any, rank: int):
        super().__init__(engine)
        self.rank = rank  # on data x context

    @property
    def master_partitions(self) -> list[Tensor]:
        return self.optimizer.fp32_partitioned_groups_flat

    def reduced_grads(self) -> list[tuple[list[nn.Parameter], list[Tensor]]]:
        groups = self.optimizer.fp16_groups
        return [(group, list(self.optimizer.averaged_gradients[i])) for i, group in enumerate(groups)]

    def reduce_grad_norm(self) -> list[Tensor]:
        return self.optimizer._get_norm_groups()

    def total_norm(self, norm: list[Tensor]) -> Tensor:
        return module_of(self.optimizer).combine_grad_norm_groups(norm)

    def known_norm(self, norm: Any) -> AbstractContextManager:
        return replaced(self.optimizer, _get_norm_groups=lambda: norm)

    def known_overflow(self) -> AbstractContextManager:
        return self.known_norm([torch.tensor(math.inf)])

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


def build_zero_adapter(engine: Any, stage: int, dtype: torch.dtype, rank: int) -> ZeroAdapter:
    """The adapter to the optimizer that DeepSpeed chooses for a ZeRO stage and dtype; `rank`: on data x context."""
    if stage == 3:
        return Stage3(engine, rank)
    return Bf16Stage1(engine) if stage == 1 and dtype == torch.bfloat16 else Stage1And2(engine)


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


def set_counted_in_norm(parameter: nn.Parameter, is_counted: bool) -> None:
    """Whether DeepSpeed counts this rank's copy of the parameter in the gradient norm. Before the engine is built.

    Rank 0 of pipeline x tensor counts all its parameters, the other ranks those with this attribute.
    """
    parameter.model_parallel = is_counted
