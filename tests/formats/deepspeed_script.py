"""A training script of DeepSpeed without MegaSora's engine, trainer and checkpoints: the model, the data and the
objective are MegaSora's, all else is what a user of DeepSpeed writes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megasora.build import build_model, patch_dim
from megasora.config import Config, load
from megasora.data.loader import PackLoader
from megasora.data.mixture import open_mixture
from megasora.data.packing_plan import Cursor
from megasora.diffusion.flow import FlowMatching, velocity_error
from megasora.model.flops import attention_break_even_tokens
from megasora.optim.schedule import lr_at
from megasora.parallel.deepspeed_engine import import_deepspeed
from megasora.parallelize import uses_weight_decay
from megasora.text import build_text_encoder


@dataclass(frozen=True)
class Script:
    """One run of the script: it loads `source`, trains `steps` steps and saves to `out`."""

    source: str
    out: str
    stage: int
    dtype: str = "fp32"
    steps: int = 5
    is_universal: bool = False
    zero: tuple[tuple[str, object], ...] = ()  # more settings of zero_optimization


def run_scripts(arguments: list[str], scripts: list[Script]) -> list[list[float]]:
    """The losses of each script, on each rank of an existing process group."""
    config = load(arguments[0], arguments[1:])
    with contextlib.redirect_stdout(io.StringIO()):
        return [run_script(config, script) for script in scripts]


def run_script(config: Config, script: Script) -> list[float]:
    engine = build_engine(config, script)
    path, client_state = engine.load_checkpoint(script.source)
    assert path is not None
    for group, decay in zip(engine.optimizer.param_groups, (config.optim.weight_decay, 0.0), strict=True):
        assert group["weight_decay"] == decay or script.is_universal  # of stage 3: that of the first group
        group["weight_decay"] = decay
    for values in engine.optimizer.optimizer.state.values() if script.is_universal else ():
        values["step"] = values["step"].clone()  # of stage 3: one tensor, that each group would count up
    state = client_state["megasora"]
    losses = train(config, engine, state, script.steps)
    if script.out:
        engine.save_checkpoint(script.out, client_state={"megasora": state})
    return losses


def build_engine(config: Config, script: Script):
    deepspeed, optim = import_deepspeed(), config.optim
    torch.manual_seed(7)
    model = build_model(config, patch_dim(config))
    decayed = [p for name, p in model.named_parameters() if uses_weight_decay(name, p)]
    others = [p for name, p in model.named_parameters() if not uses_weight_decay(name, p)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        lr=1.0, betas=(0.5, 0.5), weight_decay=3.0,  # all of these come with the checkpoint
    )  # fmt: skip
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.data.packs_per_step // dist.get_world_size(),
        "gradient_clipping": optim.max_grad_norm,
        "zero_optimization": {"stage": script.stage, **dict(script.zero)},
        "bf16": {"enabled": script.dtype == "bf16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "checkpoint": {"load_universal": script.is_universal},
        "steps_per_print": 1 << 60,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def train(config: Config, engine, state: dict, steps: int) -> list[float]:
    """Trains from `state`, which it sets to the one after the last step."""
    rank, size = dist.get_rank(), dist.get_world_size()
    objective, encoder = FlowMatching(config.objective, config.run.seed), build_text_encoder(config.text)
    clips = open_mixture(config.data, "train")
    break_even = attention_break_even_tokens(config.model, clips.manifest.patch_dim)
    cursor = Cursor(**state["task"]["cursor"])
    loader = PackLoader(
        clips,
        config.data,
        config.run.seed,
        lambda caption: encoder.encode([caption])[0],
        break_even,
        rank,
        size,
        cursor,
    )
    losses = []
    for batch, _ in zip(loader.steps(), range(steps), strict=False):
        noised, targets, weights = zip(*(objective.add_noise(pack, state["step"]) for pack in batch.packs), strict=True)
        num_tokens = torch.tensor(sum(float(weight.sum()) for weight in weights))
        dist.all_reduce(num_tokens)
        total = torch.zeros((), dtype=torch.float64)
        for pack, target, weight in zip(noised, targets, weights, strict=True):
            error = velocity_error(engine(pack), target, weight).squared_error_sum
            engine.backward(error / num_tokens * size * len(batch.packs))  # DeepSpeed divides by both
            for group in engine.optimizer.param_groups:
                group["lr"] = lr_at(state["step"], config.run.steps, config.optim)
            engine.step()
            total += error.detach().double()
        dist.all_reduce(total)
        losses.append(float(total / num_tokens))
        state["step"] += 1
        state["task"]["cursor"] = dataclasses.asdict(batch.next_cursor)
    return losses
