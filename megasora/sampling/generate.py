"""Prompts to patches: integrates the predicted velocity from noise to data, with classifier-free guidance.

All prompts, with and without their captions, are one pack: one model call per evaluation of the velocity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megasora.batch import VideoBatch, segment_ids
from megasora.config import ObjectiveConfig, SampleConfig
from megasora.data.pack import Record, make_batch
from megasora.diffusion import noise
from megasora.diffusion.flow import NOISE, SAMPLING_STEP, build_rows, round_up_to_even
from megasora.diffusion.samplers import integrate, timestep_grid
from megasora.diffusion.timesteps import shift_factor


@dataclass(frozen=True)
class Prompt:
    """Grid, caption and size of a clip to sample. `clean` = (head, tail) latent frames of its patches are kept.

    `negative_SE`: the encoded caption that guidance moves away from; None: the null token.
    """

    record: Record
    clean: tuple[int, int] = (0, 0)
    negative_SE: Tensor | None = None


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
    """The sampled patches [l, P] of each prompt, on the CPU. Calls `progress` after each model call.

    The noise of a prompt depends only on `seed` and its sample id, not on the other prompts.
    """
    is_guided = sample.guidance_scale != 1.0
    batch = build_batch(prompts, is_guided)
    cu = batch.cu_segments[: len(prompts) + 1]
    length = int(cu[-1])  # tokens with a caption; those without follow them
    segment_L = segment_ids(cu, length)
    row_L = segment_ids(batch.cu_rows, len(batch.patches_LP))[:length]
    is_noised_L1 = (batch.timesteps_R[row_L] > 0)[:, None].to(device)
    noise_LP = draw_noise(batch, cu, seed).to(device)
    batch = batch.to(device)
    x_LP = torch.where(is_noised_L1, noise_LP, batch.patches_LP[:length])

    factor_L1 = shift_factor(cu.diff(), objective)[segment_L, None].float().to(device)
    timesteps = [t_L1 * is_noised_L1 for t_L1 in timestep_grid(sample.num_inference_steps, factor_L1)]
    first_token_R = (batch.cu_rows[:-1].long() % length).to(device)  # rows without a caption: as those with it

    def velocity(x_LP: Tensor, t_L1: Tensor) -> Tensor:
        patches_LP = torch.cat((x_LP, x_LP)) if is_guided else x_LP
        v_LP = model(dataclasses.replace(batch, patches_LP=patches_LP, timesteps_R=t_L1[first_token_R, 0]))
        progress()
        if not is_guided:
            return v_LP
        conditional, unconditional = v_LP.split(length)
        return unconditional + sample.guidance_scale * (conditional - unconditional)

    x_LP = integrate(velocity, x_LP, timesteps, sample.solver)
    return list(x_LP.cpu().split(cu.diff().tolist()))


def build_batch(prompts: list[Prompt], is_guided: bool) -> VideoBatch:
    """A pack of all prompts, on the CPU; `is_guided`: followed by all of them again, with hidden or negative captions.

    `timesteps_R` is 1 at rows to sample and 0 at clean ones.
    """
    doubled = [*prompts, *(unconditional(prompt) for prompt in prompts)] if is_guided else prompts
    batch = make_batch([p.record for p in doubled], sum(len(p.record.patches_LP) for p in doubled))
    drop_text_G = batch.drop_text_G.clone()
    drop_text_G[len(prompts) :] = torch.tensor([p.negative_SE is None for p in doubled[len(prompts) :]])
    cu_rows, timesteps_R, segment_R = build_rows(batch, torch.ones(len(doubled)), [p.clean for p in doubled])
    return dataclasses.replace(
        batch, drop_text_G=drop_text_G, cu_rows=cu_rows, timesteps_R=timesteps_R.float(), row_segment_R=segment_R
    )


def unconditional(prompt: Prompt) -> Prompt:
    """The prompt with its negative caption, if it has one."""
    if prompt.negative_SE is None:
        return prompt
    return dataclasses.replace(prompt, record=dataclasses.replace(prompt.record, text_SE=prompt.negative_SE))


def draw_noise(batch: VideoBatch, cu: Tensor, seed: int) -> Tensor:
    """Standard normals fp32 [L, P] for the first segments of `batch`, whose boundaries are `cu`."""
    length, dim = int(cu[-1]), batch.patches_LP.shape[1]
    segment_L = segment_ids(cu, length)
    keys_G = noise.clip_keys(seed, SAMPLING_STEP, batch.sample_ids_G[: len(cu) - 1], NOISE)
    first_L = (torch.arange(length) - cu[segment_L]) * round_up_to_even(dim)
    return noise.normal(keys_G[segment_L], first_L, dim)


def num_model_calls(sample: SampleConfig) -> int:
    """How many times `generate` calls the model."""
    return sample.num_inference_steps if sample.solver == "euler" else 2 * sample.num_inference_steps - 1
