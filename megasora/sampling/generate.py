"""Prompts to patches: the objective run backwards, guided; all prompts, with and without caption, in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megasora.batch import VideoBatch, owner_of_tokens
from megasora.config import ObjectiveConfig, SampleConfig
from megasora.data.pack import Record, make_batch
from megasora.diffusion import noise
from megasora.diffusion.flow import NOISE, SAMPLING_STEP, even, rows_of
from megasora.diffusion.samplers import integrate, timestep_grid
from megasora.diffusion.timesteps import shift_factor


@dataclass(frozen=True)
class Prompt:
    """A record whose patches are empty but for `clean` = (head, tail) latent frames, which are kept as they are."""

    record: Record
    clean: tuple[int, int] = (0, 0)


@torch.no_grad()
def generate(
    model: Callable[[VideoBatch], Tensor],
    prompts: list[Prompt],
    objective: ObjectiveConfig,
    sample: SampleConfig,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """Patches [l, P] of each prompt. Its noise depends on (seed, its sample id) alone, not on its company."""
    records = [p.record for p in prompts]
    guided = sample.guidance != 1.0
    doubled = [*records, *records] if guided else records
    batch = make_batch(doubled, sum(len(r.patches_LP) for r in doubled))
    drop = batch.drop_text_G.clone()
    drop[len(records) :] = True
    cu_rows, rows, owner = rows_of(batch, torch.ones(len(doubled)), [p.clean for p in prompts] * (2 if guided else 1))
    batch = dataclasses.replace(batch, drop_text_G=drop, cu_rows=cu_rows, row_segment_R=owner)
    batch = batch.to(device)

    length = sum(len(r.patches_LP) for r in records)  # the half with captions; the other follows it
    cu = batch.cu_segments[: len(records) + 1]
    segment_L = owner_of_tokens(cu, length)
    dim = batch.patches_LP.shape[1]
    keys = noise.clip_keys(seed, SAMPLING_STEP, batch.sample_ids_G[: len(records)], NOISE)
    first_L = (torch.arange(length) - cu[segment_L]) * even(dim)
    x_LP = noise.normal(keys[segment_L], first_L, dim).to(device)
    row_L = owner_of_tokens(cu_rows, len(batch.patches_LP))
    free_L1 = (rows[row_L[:length]] > 0)[:, None].to(device)
    x_LP = torch.where(free_L1, x_LP, batch.patches_LP[:length])

    factors = shift_factor(cu.diff(), objective)[segment_L, None].float().to(device)
    levels = [level * free_L1 for level in timestep_grid(sample.steps, factors)]
    first_of_row = cu_rows[:-1].long() % length  # the unguided half has the levels of the guided one

    def velocity(x: Tensor, level_L1: Tensor) -> Tensor:
        t_R = level_L1[first_of_row.to(device), 0]
        x_both = torch.cat((x, x)) if guided else x
        v = model(dataclasses.replace(batch, patches_LP=x_both, timesteps_R=t_R))
        progress()
        if not guided:
            return v
        conditional, unconditional = v.split(length)
        return unconditional + sample.guidance * (conditional - unconditional)

    x_LP = integrate(velocity, x_LP, levels, sample.solver)
    return list(x_LP.cpu().split(cu.diff().tolist()))


def calls_of(sample: SampleConfig) -> int:
    """Model calls that `generate` makes."""
    return sample.steps if sample.solver == "euler" else 2 * sample.steps - 1
