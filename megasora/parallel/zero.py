"""ZeRO by DeepSpeed: optimizer states (stage 1) and gradients (stage 2) live in slices over the data-parallel ranks.

The only file that imports deepspeed. In: the sum over a rank's packs of loss / (tokens of all ranks). Out: weights
moved by one AdamW step that no number of ranks changes. DeepSpeed averages gradients over ranks; the loss is multiplied
by their number, so that what remains is the sum.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megasora.batch import VideoBatch
from megasora.config import Config
from megasora.parallel.world import World

TAG = "zero"
NO_DECAY_BELOW_DIMS = 2  # biases, norm weights and tables of one dim are not decayed


@dataclass(frozen=True)
class Fragment:
    """The slice of a parameter whose fp32 master copy this rank holds; `values` is live."""

    name: str
    start: int  # in the flattened parameter
    values: Tensor  # fp32 [n]


class ZeroEngine:
    """A model under training. Call it with a pack; then `backward`, once a pack; `step` after the last pack."""

    def __init__(self, model: nn.Module, config: Config, world: World, dtype: torch.dtype):
        deepspeed = import_deepspeed()
        self.world = world
        self.packs = config.data.packs_per_step // world.size
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            weight_decay_groups(parameters, config.optim.weight_decay),
            lr=config.optim.rate,
            betas=tuple(config.optim.betas),
            eps=config.optim.eps,
            fused=world.device.type == "cuda",
        )
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.packs,
            "gradient_clipping": config.optim.clip,
            "zero_optimization": {
                "stage": config.parallel.zero_stage,
                "reduce_bucket_size": min(500_000_000, sum(p.numel() for p in parameters)),
                "overlap_comm": world.device.type == "cuda",
            },
            "bf16": {"enabled": dtype == torch.bfloat16},
            "data_types": {"grad_accum_dtype": "fp32"},
            "steps_per_print": 1 << 60,
        }
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model.to(world.device), optimizer=optimizer, config=settings, dist_init_required=False
        )

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    def __call__(self, batch: VideoBatch) -> Tensor:
        return self.engine(batch)

    def backward(self, loss: Tensor) -> None:
        """`loss`: this pack's share of the global mean, its sum divided by the tokens of all packs of all ranks."""
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def finish_pack(self, rate: float) -> float | None:
        """Call after each `backward`. At a step's last pack: clip, AdamW at `rate`; returns the gradient's norm."""
        last = self.engine.is_gradient_accumulation_boundary()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm()) if last else None

    def fragments(self) -> list[Fragment]:
        """Every master slice of this rank. The tensors stay valid, and change with each step."""
        found = []
        for name, parameter in self.module.named_parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                found.append(Fragment(name, mapping.lp_fragment_address.start, mapping.get_hp_fragment().view(-1)))
        return found

    def full_tensors(self, fragments: Iterable[Fragment]) -> dict[str, Tensor] | None:
        """Puts the slices of all ranks together, on the main one; None elsewhere."""
        # clone: a slice would be sent with the whole flat buffer it lies in
        mine = [(f.name, f.start, f.values.detach().cpu().clone()) for f in fragments]
        everyone = self.world.gather(mine)
        if everyone is None:
            return None
        shapes = {name: p.shape for name, p in self.module.named_parameters()}
        full = {name: torch.zeros(shape.numel()) for name, shape in shapes.items()}
        for name, start, values in (part for rank in everyone for part in rank):
            full[name][start : start + len(values)] = values
        return {name: tensor.view(shapes[name]) for name, tensor in full.items()}

    def save(self, folder: Path) -> None:
        """Weights and optimizer states, each rank its own file, below `folder`. All ranks must call it."""
        self.engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        found, _ = self.engine.load_checkpoint(str(folder), tag=TAG)
        if found is None:
            raise FileNotFoundError(f"{folder / TAG} holds no DeepSpeed checkpoint")


def weight_decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict]:
    decayed = [p for p in parameters if p.ndim >= NO_DECAY_BELOW_DIMS]
    others = [p for p in parameters if p.ndim < NO_DECAY_BELOW_DIMS]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def import_deepspeed():
    """DeepSpeed without its noise and, on a CPU, without the C++ op that it would compile at first use.

    Its communication backend asks the accelerator for a shared-memory op (40 s of a C++ compiler), which only inference
    uses. An accelerator that answers None to that question is one without the op.
    """
    quiet = logging.getLogger("DeepSpeed")
    quiet.addFilter(
        lambda record: record.levelno >= logging.WARNING and "accelerator to CPU" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*")
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
