"""Builds DeepSpeed's engine: its import, configuration and process groups. The only file that imports DeepSpeed."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megasora.config import Config
from megasora.parallel.deepspeed_optimizers import local_shape
from megasora.parallel.layout import resolve_zero_stage
from megasora.parallel.mesh import Mesh

BUCKET_ELEMENTS, BUCKET_ELEMENTS_PER_RANK = 40_000_000, 1_000_000  # gradients in a message, as in Megatron
BUCKETS = 4  # at least
UNWANTED = re.compile("accelerator to CPU|OVERFLOW! Skipping step|untested optimizer")  # messages


def build_deepspeed_engine(
    module: nn.Module, optimizer: torch.optim.Optimizer, config: Config, mesh: Mesh, dtype: torch.dtype
) -> Any:
    """A DeepSpeedEngine that trains `module`, on its device, with `optimizer`; changes both. All ranks must call it."""
    deepspeed = import_deepspeed()
    with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints the memory in use for each group
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config(module, config, mesh, dtype),
            dist_init_required=False,
            mpu=DeepSpeedMPU(mesh) if mesh.model.is_split else None,
        )
    return engine


def build_partitioner(config: Config, mesh: Mesh, dtype: torch.dtype) -> Callable[[nn.Parameter], None]:
    """A function for ZeRO 3: converts a parameter to `dtype` and divides it over data x context, so that no rank has a
    whole model before `build_deepspeed_engine`. All ranks must call it for the same parameters in the same order; the
    values of the first rank of data x context count."""
    deepspeed = import_deepspeed()
    divided: list[nn.Parameter] = []

    def partition(parameter: nn.Parameter) -> None:
        parameter.data = parameter.data.to(dtype)
        if divided:
            divided[0].convert_to_zero_parameters([parameter])
            return
        module, mpu = nn.ParameterList([parameter]), DeepSpeedMPU(mesh) if mesh.model.is_split else None
        deepspeed.zero.Init(
            module=module,
            data_parallel_group=mpu and mpu.get_data_parallel_group(),
            dtype=dtype,
            config_dict_or_path=deepspeed_config(module, config, mesh, dtype),
            mpu=mpu,
        )
        divided.append(parameter)

    return partition


def deepspeed_config(module: nn.Module, config: Config, mesh: Mesh, dtype: torch.dtype) -> dict[str, Any]:
    """Gradients are accumulated over packs and summed over data x context in fp32, whatever the dtype of the model.

    With a pipeline DeepSpeed sees one microbatch per step, and its hooks must do nothing in the backward passes.
    """
    has_pipeline, device = mesh.pipeline.is_split, next(module.parameters()).device
    sizes = [local_shape(p).numel() for p in module.parameters()]
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1 if has_pipeline else config.data.packs_per_step // mesh.data.size,
        "gradient_clipping": 0.0,  # ZeroEngine clips
        "zero_optimization": {
            "stage": resolve_zero_stage(config.parallel, device.type),
            "reduce_bucket_size": bucket_elements(sizes, mesh.data_context.size),
            "overlap_comm": device.type == "cuda" and not has_pipeline and mesh.data_context.is_split,
            "contiguous_gradients": not has_pipeline,
        },
        "zero_allow_untested_optimizer": True,  # PartitionAdamW
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a microbatch
        "bf16": {"enabled": dtype == torch.bfloat16, "immediate_grad_update": not has_pipeline},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",  # otherwise bf16, which loses up to a third of a sum over 1,024 ranks
        "steps_per_print": 1 << 60,
    }


def bucket_elements(sizes: list[int], ranks: int) -> int:
    """How many gradients stages 2 and 3 reduce at once, of parameters with so many elements: a quarter of them, so that
    most are reduced during the backward pass; of large models fewer, and no less than the largest parameter has."""
    quarter = -(-sum(sizes) // BUCKETS)
    return max(*sizes, min(quarter, max(BUCKET_ELEMENTS, ranks * BUCKET_ELEMENTS_PER_RANK)))


class DeepSpeedMPU:
    """The `mpu` argument of DeepSpeed: process groups of the model (pipeline x tensor) and of data (data x context)."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.model.group

    def get_model_parallel_rank(self) -> int:
        return self.mesh.model.rank

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.model.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.data_context.group

    def get_data_parallel_rank(self) -> int:
        return self.mesh.data_context.rank

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.data_context.size


def import_deepspeed() -> Any:
    """Imports DeepSpeed without its log output and, on a CPU, without the C++ op that it would compile at first use.

    Its communication backend asks the accelerator for a shared-memory op, which takes a compiler 40 s and which only
    inference uses. An accelerator that answers None is one without the op.
    """
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: record.levelno >= logging.WARNING and not UNWANTED.search(record.getMessage())
    )
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor.*")
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class AcceleratorWithoutOps(CPU_Accelerator):
        def create_op_builder(self, op_name):
            return None

    on_cpu = get_accelerator().device_name() == "cpu"
    if on_cpu:
        set_accelerator(AcceleratorWithoutOps())
    backend = "gloo" if on_cpu else get_accelerator().communication_backend_name()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it, even without a launcher
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed
