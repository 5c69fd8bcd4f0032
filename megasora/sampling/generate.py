"""Prompts to patches: integrates the predicted velocity from noise to data, with guidance.

Each latent frame of a clip has a start level s in [0, 1], the timestep at which its sampling begins:

    x(s) = (1 - s) given + s noise        s = 0: given, stays clean; s = 1: pure noise; between: partly clean [SDEdit]

At timestep t of the clip, the tokens of a latent frame are at min(t, s). A held token stays on the straight path from
its noise to its given value: the solver gets the exact velocity of this path in place of the predicted one.

All prompts are one pack. The branches of guidance are packs of their own: one list of packs per evaluation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megasora.batch import VideoBatch, segment_ids
from megasora.config import ObjectiveConfig, SampleConfig
from megasora.data.pack import Record, make_batch
from megasora.diffusion.flow import NOISE, SAMPLING_STEP, round_up_to_even, split_into_rows
from megasora.diffusion.guidance import Branch, Guidance
from megasora.diffusion.noise import clip_keys
from megasora.diffusion.samplers import integrate, num_model_calls
from megasora.diffusion.timesteps import shift, shift_factor, unshift
from megasora.random_numbers import normal

Denoise = Callable[[list[VideoBatch]], list[Tensor]]  # noised packs -> velocities [L, P] of each, at least fp32


@dataclass(frozen=True)
class ClipPrompt:
    """A clip to sample. The patches of `record` are the given values; at start level 1 they are not used."""

    record: Record  # grid, caption and size of the clip; its sample id is part of the key of the noise
    start_T: Tensor  # fp32 [T] in [0, 1]: start level of each latent frame
    held_L: Tensor | None = None  # bool [l]: tokens on the straight path to their given value; None: no token
    negative_SE: Tensor | None = None  # the encoded caption that guidance moves away from; None: the null token
    seed: int = 0
    window: int = 0  # number of the window in a long clip: each has its own noise

    @classmethod
    def of_text(cls, record: Record, seed: int = 0) -> ClipPrompt:
        """Nothing but the caption is given."""
        return cls(record, torch.ones(record.grid[0]), seed=seed)


@torch.no_grad()
def generate(
    denoise: Denoise,
    prompts: list[ClipPrompt],
    objective: ObjectiveConfig,
    sample: SampleConfig,
    device: torch.device | str = "cpu",
    pad_tokens: Callable[[int], int] = lambda tokens: tokens,
    progress: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """The sampled patches fp32 [l, P] of each prompt, on the CPU.

    `pad_tokens(tokens)` is the length of a pack with so many tokens. `progress` is called after each evaluation of the
    velocity, `num_evaluations` times. The noise of a prompt depends on its seed, window and sample id only.
    """
    state = PackState(prompts, objective, sample, pad_tokens, device)
    if state.num_steps == 0:  # everything is given
        return state.split(state.given_LP)

    def velocity(x_LP: Tensor, t_L1: Tensor) -> Tensor:
        branches = state.guidance.branches(t_L1)
        velocities = denoise([state.batch(branch, x_LP, t_L1) for branch in branches])
        progress()
        v_LP = state.guidance.combine(
            dict(zip(branches, velocities, strict=True)), t_L1, state.segment_L, state.is_noised_L
        )
        return torch.where(state.held_L1, state.noise_LP - state.given_LP, v_LP)

    return state.split(integrate(velocity, state.start(), state.timesteps(), sample.solver))


def num_evaluations(prompts: list[ClipPrompt], objective: ObjectiveConfig, sample: SampleConfig) -> int:
    """How many times `generate` evaluates the velocity."""
    steps = num_steps(prompts, objective, sample)
    return num_model_calls(sample.solver, steps) if steps else 0


def num_steps(prompts: list[ClipPrompt], objective: ObjectiveConfig, sample: SampleConfig) -> int:
    """Solver steps of a pack: those of the clip with the most."""
    return max(steps_of(prompt, objective, sample) for prompt in prompts)


def steps_of(prompt: ClipPrompt, objective: ObjectiveConfig, sample: SampleConfig) -> int:
    """Solver steps of a clip: sample.num_inference_steps from level 1, and in proportion fewer from a lower level."""
    return math.ceil(sample.num_inference_steps * first_timestep(prompt, objective) - 1e-6)


def first_timestep(prompt: ClipPrompt, objective: ObjectiveConfig) -> float:
    """The highest start level of a prompt, before the shift of timesteps."""
    factor = shift_factor(torch.tensor(len(prompt.record.patches_LP)), objective)
    return float(unshift(prompt.start_T.max().double(), factor))


class PackState:
    """The prompts of one pack: what is given, their noise and timesteps, and the batches of guidance.

    Tensors with a suffix L are of all tokens of the pack, padding included, on `device`.
    """

    def __init__(
        self,
        prompts: list[ClipPrompt],
        objective: ObjectiveConfig,
        sample: SampleConfig,
        pad_tokens: Callable[[int], int],
        device: torch.device | str,
    ):
        self.prompts, self.sample = prompts, sample
        records = [prompt.record for prompt in prompts]
        pack = make_batch(records, pad_tokens(sum(len(record.patches_LP) for record in records)))
        self.lengths = [len(record.patches_LP) for record in records]
        length, tokens = len(pack.patches_LP), pack.num_tokens
        self.segment_L = segment_ids(pack.cu_segments, length)
        self.runs = [runs_of(prompt.start_T) for prompt in prompts]
        self.rows = {  # of each branch: cu_rows, first token of each row, segment of each row
            True: self.rows_of(pack, self.runs),
            False: self.rows_of(pack, [[(int(prompt.record.grid[0]), 1.0)] for prompt in prompts]),
        }
        start_L = torch.zeros(length)
        start_L[:tokens] = torch.cat([start_of_tokens(prompt) for prompt in prompts])
        held_L = torch.zeros(length, dtype=torch.bool)
        held_L[:tokens] = torch.cat([held_tokens(prompt) for prompt in prompts])
        noise_LP = torch.zeros(length, pack.patches_LP.shape[1])
        noise_LP[:tokens] = torch.cat([draw_noise(prompt) for prompt in prompts])

        factor_G = shift_factor(pack.cu_segments.diff(), objective)
        first_G = torch.tensor([first_timestep(prompt, objective) for prompt in prompts], dtype=torch.float64)
        steps_G = torch.tensor([steps_of(prompt, objective, sample) for prompt in prompts])
        self.num_steps = int(steps_G.max())
        self.clip_timesteps = [  # of each step: the timestep of the clip of each token, 0 after the steps of the clip
            shift(first_G * (1 - i / steps_G.clamp_min(1)).clamp_min(0), factor_G)[self.segment_L, None].float()
            for i in range(self.num_steps + 1)
        ]
        has_context = any(bool((prompt.start_T < prompt.start_T.max()).any()) for prompt in prompts)
        self.guidance = Guidance(sample, has_context)
        self.pack, self.negative = pack.to(device), self.negative_texts(pack, device)
        self.given_LP, self.noise_LP = self.pack.patches_LP.float(), noise_LP.to(device)
        self.start_L1, self.held_L1 = start_L[:, None].to(device), held_L[:, None].to(device)
        self.is_noised_L = start_L > 0

    @staticmethod
    def rows_of(pack: VideoBatch, runs: list[list[tuple[int, float]]]) -> tuple[Tensor, Tensor, Tensor]:
        cu_rows, _, segment_R = split_into_rows(pack, runs)
        return cu_rows, cu_rows[:-1].long(), segment_R

    def negative_texts(self, pack: VideoBatch, device: torch.device | str) -> dict[str, Tensor]:
        """What replaces the captions of the pack in the branches without them."""
        texts = [p.record.text_SE if p.negative_SE is None else p.negative_SE for p in self.prompts]
        lengths = torch.tensor([0, *(len(text) for text in texts)])
        return {
            "text_SE": torch.cat(texts).to(device),
            "cu_text": lengths.cumsum(0).to(torch.int32),
            "drop_text_G": torch.tensor([p.negative_SE is None for p in self.prompts]).to(device),
        }

    def start(self) -> Tensor:
        """x [L, P] at the first timestep."""
        return torch.lerp(self.given_LP, self.noise_LP, self.start_L1)

    def timesteps(self) -> list[Tensor]:
        """num_steps + 1 tensors [L, 1]: the timestep of each token."""
        return [torch.minimum(t_L1.to(self.start_L1.device), self.start_L1) for t_L1 in self.clip_timesteps]

    def batch(self, branch: Branch, x_LP: Tensor, t_L1: Tensor) -> VideoBatch:
        """The noised pack of one branch of guidance at the timesteps [L, 1] of the tokens.

        Without clean frames, the given frames are noised to the timestep of their clip.
        """
        cu_rows, first_R, segment_R = self.rows[branch.clean_frames]
        if not branch.clean_frames:
            t_L1 = self.timestep_of_clips(t_L1)
            is_given_L1 = t_L1 > self.start_L1
            x_LP = torch.where(is_given_L1, torch.lerp(self.given_LP, self.noise_LP, t_L1), x_LP)
        return dataclasses.replace(
            self.pack,
            patches_LP=x_LP,
            cu_rows=cu_rows,
            timesteps_R=t_L1[first_R.to(t_L1.device), 0],
            row_segment_R=segment_R.to(t_L1.device),
            **({} if branch.caption else self.negative),
        )

    def timestep_of_clips(self, t_L1: Tensor) -> Tensor:
        """[L, 1]: the highest timestep of any token of the clip that a token is of."""
        segment_L = self.segment_L.to(t_L1.device)
        highest_G = torch.zeros(len(self.prompts), device=t_L1.device)
        highest_G = highest_G.scatter_reduce(0, segment_L, t_L1[:, 0].contiguous(), "amax")
        return highest_G[segment_L, None]

    def split(self, x_LP: Tensor) -> list[Tensor]:
        """[L, P] -> patches [l, P] of each prompt, on the CPU."""
        return list(x_LP[: sum(self.lengths)].float().cpu().split(self.lengths))


def runs_of(start_T: Tensor) -> list[tuple[int, float]]:
    """(latent frame after the run, start level) of each run of equal start levels."""
    levels = start_T.tolist()
    ends = [i for i in range(1, len(levels) + 1) if i == len(levels) or levels[i] != levels[i - 1]]
    return [(end, levels[end - 1]) for end in ends]


def start_of_tokens(prompt: ClipPrompt) -> Tensor:
    """fp32 [l]: the start level of each token."""
    _, h, w = prompt.record.grid
    return prompt.start_T.float().repeat_interleave(h * w)


def held_tokens(prompt: ClipPrompt) -> Tensor:
    """bool [l]"""
    return prompt.held_L if prompt.held_L is not None else torch.zeros(len(prompt.record.patches_LP), dtype=torch.bool)


def draw_noise(prompt: ClipPrompt) -> Tensor:
    """Standard normals fp32 [l, P], a function of the prompt's seed, window and sample id."""
    length, dim = prompt.record.patches_LP.shape
    step = SAMPLING_STEP - prompt.window
    key_G = clip_keys(prompt.seed, step, torch.tensor([prompt.record.sample_id]), NOISE)
    return normal(key_G.expand(length), torch.arange(length) * round_up_to_even(dim), dim)
