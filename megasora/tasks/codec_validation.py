"""Validation of a codec: reconstructions of held-out clips, without noise and with the present weights.

    data.crop of each clip, from its middle  --network-->  means of the loss terms, psnr, ssim, flicker; pictures

RUN/reconstructions/step-XXXXXXXX.png shows the first clips (codec_pictures.py).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megasora.codec.metrics import Metrics
from megasora.codec.vae.losses import frame_terms
from megasora.codec.vae.lpips import LPIPS
from megasora.codec.vae.quantizers import perplexity
from megasora.config import Config
from megasora.data.clip_loader import Crop, stack_clips
from megasora.data.decoded_clips import DecodedClips
from megasora.data.patches import frames_to_uint8
from megasora.ingest.listing import ClipSource
from megasora.parallel.mesh import Mesh
from megasora.parallel.world import World
from megasora.parallel.zero import ZeroEngine
from megasora.tasks.codec_losses import PENALTIES, total_loss
from megasora.tasks.codec_pictures import PICTURED_CLIPS, picture_of, write_pictures
from megasora.tasks.codec_work import StackOutput, WorkBuilder

FRAMES_AT_ONCE = 16  # of which the loss terms are computed
METRICS = ("psnr", "ssim", "flicker")


class ValidationTotals:
    """Sums over the clips of a rank; they add up over ranks. `terms`: of the loss, as in `frame_terms`."""

    def __init__(self, config: Config, lpips: LPIPS | None):
        self.weights, self.lpips, self.penalty = config.reconstruction, lpips, PENALTIES.get(config.vae.kind)
        self.terms = ("l1", "mse", "gradient", "ssim", *(["lpips"] if lpips else []))
        self.values = dict.fromkeys((*self.terms, "pixels", "penalty", "latents"), 0.0)
        self.metrics = Metrics()
        self.code_counts: Tensor | None = None
        self.non_finite: list[int] = []

    def add_frames(self, sample_id: int, frames: Tensor, target: Tensor) -> None:
        """A clip and its reconstruction, [3, T, H, W]."""
        pixels = target.shape[2] * target.shape[3]
        loss = 0.0
        for x, y in zip(frames.split(FRAMES_AT_ONCE, 1), target.split(FRAMES_AT_ONCE, 1), strict=True):
            terms = frame_terms(x[None], y[None], self.lpips)
            for name in self.terms:
                value = float(terms[name].sum(dtype=torch.float64)) * pixels
                self.values[name] += value
                loss += value
        self.values["pixels"] += target.shape[1] * pixels
        self.metrics.add(frames.transpose(0, 1), target.transpose(0, 1))
        if not math.isfinite(loss):
            self.non_finite.append(sample_id)

    def add_latents(self, output: StackOutput) -> None:
        self.values["penalty"] += float(output.penalty_sum)
        self.values["latents"] += output.num_latents
        if output.counts is not None:
            self.code_counts = output.counts if self.code_counts is None else self.code_counts + output.counts

    def figures(self, sums: Tensor, code_counts: Tensor | None) -> dict[str, Any]:
        """Of all ranks: `sums` of `packed`."""
        values = dict(zip(self.values, sums.tolist(), strict=False))
        self.metrics.sums = sums[len(self.values) :]
        terms = {name: values[name] / values["pixels"] for name in self.terms}
        penalty = {self.penalty: values["penalty"] / values["latents"]} if self.penalty else {}
        metrics = self.metrics.totals()
        figures = {"loss": total_loss({**terms, **penalty}, self.weights), **{key: metrics[key] for key in METRICS}}
        figures |= {name: value for name, value in terms.items() if name != "ssim"} | penalty
        return figures if code_counts is None else {**figures, "perplexity": float(perplexity(code_counts))}

    def packed(self) -> Tensor:
        """fp64: all sums."""
        return torch.cat([torch.tensor(list(self.values.values()), dtype=torch.float64), self.metrics.sums])


class CodecValidation:
    """Measures the network of `engine` on the first validation.clips of `clips`, each (sample id, clip)."""

    def __init__(
        self,
        clips: list[tuple[int, ClipSource]],
        config: Config,
        work: WorkBuilder,
        engine: ZeroEngine,
        lpips: LPIPS | None,
        mesh: Mesh,
        world: World,
    ):
        self.clips = clips[: config.validation.clips or len(clips)]
        self.config, self.work, self.engine, self.lpips = config, work, engine, lpips
        self.mesh, self.world = mesh, world
        self.source = DecodedClips([clip.media for _, clip in self.clips], config.ingest, config.data.clip_cache_mib)
        self.crop = Crop(None, tuple(config.data.crop))

    def run(self, step: int) -> dict[str, Any] | None:
        """Figures on the main process, with the key `loss`; None on the others, and without held-out clips.

        Raises DataError. All ranks must call it.
        """
        if not self.clips:
            return None
        totals, pictures = ValidationTotals(self.config, self.lpips), []
        data, count = self.mesh.data, len(self.clips)
        # every rank runs the network equally often, since ranks share weights and clips: the last clip is then repeated
        for first in range(0, count, data.size):
            index = min(first + data.rank, count - 1)
            frames, target, output = self.reconstruct(index)
            if index != first + data.rank:
                continue
            if output is not None:
                totals.add_latents(output)
            if self.mesh.context.rank == 0:
                totals.add_frames(self.clips[index][0], frames, target)
                if index < PICTURED_CLIPS:
                    pictures.append((index, picture_of(pixels_of(target), pixels_of(frames))))
        return self.gather(step, totals, pictures)

    def reconstruct(self, index: int) -> tuple[Tensor, Tensor, StackOutput | None]:
        """A clip of the list: (its reconstruction, the clip, each fp32 [3, T, H, W]; the output of this rank's part or
        None)."""
        frames = self.crop.sides(self.source.read(index, self.crop.frames))
        (stack,) = stack_clips([(self.clips[index][0], frames)], self.work.context.factors)
        (work,) = self.work.build_pack([stack], self.no_noise)
        (output,) = self.engine.predict([[work]])[0]
        target = self.work.to_device(stack.frames_BTHWC.permute(0, 4, 1, 2, 3), torch.float32)
        (split,) = self.work.context.split([stack.frames_BTHWC.shape[:4]])
        part = None if work.is_filler else output.frames.float()
        whole = self.work.context.gather_frames(part, split, target) if self.mesh.context.is_split else part
        t, h, w = stack.size
        return whole[0, :, :t, :h, :w], target[0, :, :t, :h, :w], None if work.is_filler else output

    def no_noise(self, sample_ids: list[int], grid: tuple[int, int, int]) -> Tensor:
        return torch.zeros(len(sample_ids), self.work.channels, *grid, device=self.world.device)

    def gather(
        self, step: int, totals: ValidationTotals, pictures: list[tuple[int, np.ndarray]]
    ) -> dict[str, Any] | None:
        sums = self.world.all_reduce_sum(totals.packed()).cpu()
        by_rank = self.world.gather_objects((pictures, totals.non_finite, totals.code_counts))
        if by_rank is None:
            return None
        all_pictures = sorted((pair for rank in by_rank for pair in rank[0]), key=lambda pair: pair[0])
        write_pictures(Path(self.config.run.dir), step, [picture for _, picture in all_pictures])
        counts = [rank[2].cpu() for rank in by_rank if rank[2] is not None]
        figures = totals.figures(sums, sum(counts) if counts else None)
        non_finite = sorted({sample_id for rank in by_rank for sample_id in rank[1]})
        return {**figures, **({"non_finite_clips": non_finite} if non_finite else {})}


def pixels_of(frames: Tensor) -> np.ndarray:
    """[3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3]."""
    return frames_to_uint8(frames.nan_to_num().transpose(0, 1)).cpu().numpy()
