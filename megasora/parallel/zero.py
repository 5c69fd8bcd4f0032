"""ZeRO by DeepSpeed: optimizer states (stage 1), gradients (2) and weights (3) live in slices over data x context.

The only file that imports deepspeed. In: this rank's stages of the model and the packs of a step. Out: weights moved by
one AdamW step that no layout changes. DeepSpeed averages gradients over data x context; the loss is multiplied by their
number, so that what remains is the sum. Parameters whose gradient is a part on a tensor or pipeline rank have parameter
groups of their own: there ZeRO's slices are the same on all peers, and are summed once a step, slice by slice.

What a rank owns is told as fragments, live views of its fp32 master weights and of Adam's means. A checkpoint is made
of them; one that is loaded is written into them, whatever layout it was saved by, and `go_on` does the rest.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megasora.batch import VideoBatch
from megasora.config import Config
from megasora.fragment import Fragment
from megasora.parallel.collectives import all_reduce_sum
from megasora.parallel.context_attention import ContextAttention
from megasora.parallel.mesh import Mesh
from megasora.parallel.pipeline import Pipeline
from megasora.parallel.world import World
from megasora.placement import Placement

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")  # of the gradient and of its square


class ZeroEngine:
    """A model under training: `train_step` moves it, `predict` asks it."""

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        placements: dict[str, Placement],
        decayed: Callable[[str, Tensor], bool],
        config: Config,
        world: World,
        mesh: Mesh,
        dtype: torch.dtype,
        pipeline: Callable[[Callable[[nn.Module], None]], Pipeline] | None = None,
        attention: ContextAttention | None = None,
    ):
        deepspeed = import_deepspeed()
        self.world, self.mesh, self.placements, self.attention = world, mesh, placements, attention
        self.module = next(iter(stages.values())) if len(stages) == 1 else nn.ModuleList(stages.values())
        self.parameters = {name: p for stage in stages.values() for name, p in stage.named_parameters()}
        self.name_of = {parameter: name for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.model_parallel = placements[name].is_primary_replica(mesh.pipeline.rank, mesh.tensor.rank)  # DeepSpeed's word for: counts in the norm
        groups = parameter_groups(self.parameters, placements, decayed)
        self.check_groups(list(groups))
        optimizer = torch.optim.AdamW(
            [
                {"params": parameters, "weight_decay": config.optim.weight_decay if key[0] else 0.0}
                for key, parameters in groups.items()
            ],
            lr=config.optim.lr,
            betas=tuple(config.optim.betas),
            eps=config.optim.eps,
            fused=world.device.type == "cuda",
        )
        piped, on_gpu = pipeline is not None, world.device.type == "cuda"
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1 if piped else config.data.packs_per_step // mesh.data.size,
            "gradient_clipping": config.optim.max_grad_norm,
            "zero_optimization": {
                "stage": config.parallel.zero_stage,
                "reduce_bucket_size": min(500_000_000, sum(p.numel() for p in self.parameters.values())),
                "overlap_comm": on_gpu and not piped,
                "contiguous_gradients": not piped,  # its hooks would take part in a pipeline's backward
            },
            "bf16": {"enabled": dtype == torch.bfloat16, "immediate_grad_update": not piped},
            "data_types": {"grad_accum_dtype": "fp32"},
            "steps_per_print": 1 << 60,
        }
        with contextlib.redirect_stdout(io.StringIO()):  # its bf16 optimizer prints the memory in use, group by group
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=self.module.to(world.device),
                optimizer=optimizer,
                config=settings,
                dist_init_required=False,
                mpu=DeepSpeedMPU(mesh) if mesh.model.is_split else None,
            )
        self.adam = self.optimizer.optimizer
        self.begin_adam()
        self.pipeline = pipeline(self.fold) if pipeline is not None else None

    def check_groups(self, keys: list[tuple]) -> None:
        """DeepSpeed sums the norm group by group over the ranks that hold the model: all need the same groups."""
        everyone: list = [None] * self.mesh.model.size
        dist.all_gather_object(everyone, keys, group=self.mesh.model.group)
        if any(other != keys for other in everyone):
            raise RuntimeError(f"ranks of the pipeline and tensor axes have different parameter groups: {everyone}")

    # ------------------------------------------------------------------ a step

    def train_step(
        self,
        packs: list[VideoBatch],
        loss: Callable[[Tensor, int], Tensor],
        rate: float,
        lap: Callable[[str], None] = lambda name: None,
    ) -> float:
        """One AdamW step at `rate` on this rank's packs; returns the global norm of the gradient before clipping.

        `loss(prediction, number of the pack)`: this rank's share of the global mean; called where the last stage is.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        scale = self.mesh.data_context.size  # DeepSpeed divides by it
        if self.pipeline is not None:
            self.pipeline.forward_backward(packs, lambda prediction, number: loss(prediction, number) * scale)
            self.reduce_after_pipeline()
            lap("backward")
        for number, pack in enumerate(packs if self.pipeline is None else ()):
            value = loss(self.engine(pack), number)
            lap("forward")
            self.engine.backward(value * scale, scale_wrt_gas=False)
            lap("backward")
            if number + 1 < len(packs):
                self.engine.step()
        self.sum_partial_gradients()
        self.engine.step()
        lap("optimizer")
        return float(self.engine.get_global_grad_norm())

    def predict(self, packs: list[VideoBatch]) -> list[Tensor] | None:
        """Predictions of the last stage, without gradients, in evaluation mode; None on ranks of other stages."""
        self.module.eval()
        with torch.no_grad():
            found = self.pipeline.forward_only(packs) if self.pipeline is not None else [self.engine(p) for p in packs]
        self.module.train()
        return found

    def fold(self, stage: nn.Module) -> None:
        """Called after each micro-batch of a pipeline: adds bf16 gradients to their fp32 sums."""
        if hasattr(self.optimizer, "update_hp_grads"):
            self.optimizer.update_hp_grads()
            for parameter in stage.parameters():
                parameter.grad = None

    def reduce_after_pipeline(self) -> None:
        if hasattr(self.optimizer, "update_hp_grads"):
            self.engine.buffered_allreduce_fallback()
        else:
            self.optimizer.set_gradient_accumulation_boundary(True)
            self.optimizer.reduce_gradients(pipeline_parallel=True)

    def sum_partial_gradients(self) -> None:
        """Sums what, after ZeRO's sum over data x context, is still a part over the tensor or pipeline axis."""
        for parameters, slices in self.reduced_gradients():
            for name in self.placements[self.name_of[parameters[0]]].partial_axes:
                axis = getattr(self.mesh, name)
                flat = all_reduce_sum(torch.cat([s.reshape(-1) for s in slices]), axis)
                for target, values in zip(slices, flat.split([s.numel() for s in slices]), strict=True):
                    target.copy_(values.view_as(target))

    def reduced_gradients(self) -> list[tuple[list[nn.Parameter], list[Tensor]]]:
        """(parameters, this rank's slices of their summed gradients) of each parameter group, before the step."""
        optimizer = self.optimizer
        if hasattr(optimizer, "fp32_groups_gradients_flat"):  # bf16 with stage 1: whole gradients, not slices
            slices = [[flat] for flat in optimizer.fp32_groups_gradients_flat]
            return list(zip(optimizer.bf16_groups, slices, strict=True))
        groups = optimizer.fp16_groups if self.engine.zero_optimization_stage() == 3 else optimizer.bit16_groups
        return [(group, list(optimizer.averaged_gradients[i])) for i, group in enumerate(groups)]

    # ------------------------------------------------------------------ weights

    def fragments(self) -> list[Fragment]:
        """What this rank owns: of master weights ("weights") and Adam's means. All of it changes with each step."""
        found = []
        for name, parameter in self.parameters.items():
            if self.engine.zero_optimization_stage() == 3:
                group, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
                start, count = self.slice_of(parameter)
            elif (mapping := parameter._hp_mapping) is not None:
                group, offset = mapping.param_group_index, mapping.hp_fragment_address.start
                start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            else:
                count = 0
            if count:
                master, placement, axis = self.masters[group], self.placements[name], self.mesh.tensor
                flat = {"weights": master.detach(), **{kind: self.adam.state[master][kind] for kind in ADAM_MOMENTS}}
                values = {kind: whole[offset : offset + count] for kind, whole in flat.items()}
                shape = placement.full_shape(self.shape_of(name), axis.size)
                found.append(Fragment(name, shape, placement, axis.rank, axis.size, start, values))
        return found

    @property
    def masters(self) -> list[Tensor]:
        """This rank's fp32 master weights, flattened, by parameter group; in stage 3 by DeepSpeed's parts of groups."""
        for name in ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):  # stage 3; bf16 with stage 1
            if hasattr(self.optimizer, name):
                return getattr(self.optimizer, name)
        return self.optimizer.single_partition_of_fp32_groups

    def begin_adam(self) -> None:
        """AdamW's state before its first step, which it would make at that step: so that it can be loaded before."""
        for master in self.masters:
            count_device = master.device if self.adam.defaults["fused"] else "cpu"
            self.adam.state[master] = {
                "step": torch.zeros((), device=count_device),
                **{kind: torch.zeros_like(master, requires_grad=False) for kind in ADAM_MOMENTS},
            }

    @torch.no_grad()
    def sync_after_load(self, step: int) -> None:
        """After a checkpoint of step `step` was written into the fragments. All ranks must call it.

        The model's weights become those of the master copies, as at the end of a step.
        """
        for master in self.masters:
            self.adam.state[master]["step"].fill_(step)
        if self.engine.zero_optimization_stage() != 3:
            self.optimizer.update_lp_params()
            return
        self.optimizer.checkpoint_event_prologue()  # lets go of parameters that are whole
        for group in range(len(self.masters)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self.optimizer.checkpoint_event_epilogue()  # small ones are whole again

    def compute_weights(self) -> dict[str, Tensor]:
        """What the model computes with, by name; under stage 3 this rank's slices of it."""
        if self.engine.zero_optimization_stage() != 3:
            return dict(self.parameters)
        return {name: p.ds_tensor.narrow(0, 0, self.slice_of(p)[1]) for name, p in self.parameters.items()}

    def slice_of(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Stage 3: (start, size) of this rank's slice in the flattened parameter, without padding."""
        size = parameter.ds_tensor.ds_numel
        start = min(size * self.mesh.data_context.rank, parameter.ds_numel)
        return start, min(size, parameter.ds_numel - start)

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        ranks = self.mesh.pipeline.rank, self.mesh.tensor.rank
        here = [name for name in self.parameters if self.placements[name].is_primary_replica(*ranks)]
        count = torch.tensor(sum(self.shape_of(name).numel() for name in here))
        return int(all_reduce_sum(count.to(self.world.device), self.mesh.model))

    def shape_of(self, name: str) -> torch.Size:
        """Of this rank's part; under stage 3 a parameter itself is empty between uses."""
        parameter = self.parameters[name]
        return getattr(parameter, "ds_shape", parameter.shape)


class DeepSpeedMPU:
    """The mesh in DeepSpeed's words."""

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


def parameter_groups(
    parameters: dict[str, nn.Parameter], placements: dict[str, Placement], decayed: Callable[[str, Tensor], bool]
) -> dict[tuple, list[nn.Parameter]]:
    """By (decayed or not, axes that its gradients are still to be summed over)."""
    groups: dict[tuple, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((decayed(name, parameter), placements[name].partial_axes), []).append(parameter)
    return dict(sorted(groups.items(), reverse=True))


def import_deepspeed():
    """DeepSpeed without its noise and, on a CPU, without the C++ op that it would compile at first use.

    Its communication backend asks the accelerator for a shared-memory op (40 s of a C++ compiler), which only inference
    uses. An accelerator that answers None to that question is one without the op.
    """
    quiet = logging.getLogger("DeepSpeed")
    quiet.addFilter(
        lambda record: record.levelno >= logging.WARNING and "accelerator to CPU" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor.*")
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class AcceleratorWithoutOps(CPU_Accelerator):
        def create_op_builder(self, op_name):
            return None

    if get_accelerator().device_name() == "cpu":
        set_accelerator(AcceleratorWithoutOps())
    backend = get_accelerator().communication_backend_name() if get_accelerator().device_name() != "cpu" else "gloo"
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, without a launcher too
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed
