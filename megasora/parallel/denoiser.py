"""Denoiser: the velocities of whole noised packs, by the ranks of a layout, for sampling.

    pack [L] --share_in--> share [l] --model--> [l, P] --context: gather--> [L, P] --pipeline: broadcast--> [L, P]

Ranks that differ in their data index only are independent: each group of the others has packs of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megasora.batch import VideoBatch
from megasora.config import ParallelConfig
from megasora.parallel.mesh import Mesh
from megasora.parallel.pipeline import num_stages, rank_of_stage
from megasora.parallel.share import gather_shares, share_in, share_length_of

Predict = Callable[[list[VideoBatch]], list[Tensor] | None]


class Denoiser:
    """Velocities [L, P] of noised packs, on every rank that shares them.

    predict   velocities [l, P] of this rank's shares; None on ranks without the last pipeline stage
    stages    the model's modules on this rank
    device    where the model is
    """

    def __init__(
        self,
        predict: Predict,
        stages: Sequence[nn.Module],
        parallel: ParallelConfig,
        mesh: Mesh,
        device: torch.device,
    ):
        self.predict, self.stages, self.parallel, self.mesh, self.device = predict, stages, parallel, mesh, device
        p = parallel
        last = num_stages(p.schedule, p.pipeline, p.stages_per_rank) - 1
        self.last_rank = rank_of_stage(p.schedule, p.pipeline, last)  # of the pipeline axis: it has the predictions

    def pad_tokens(self, tokens: int) -> int:
        """The length of a pack with so many tokens: the least multiple of tensor x context ranks."""
        return share_length_of(tokens, self.parallel) * self.parallel.context

    @torch.no_grad()
    def __call__(self, packs: list[VideoBatch]) -> list[Tensor]:
        """fp32 [L, P] of each pack, zeros at padding, equal on all ranks of the tensor, context and pipeline axes.

        They must call it with the same packs. The model needs no graph: no gradients are kept.
        """
        lengths = [len(pack.patches_LP) for pack in packs]
        shares = [
            share_in(pack, share_length_of(length, self.parallel), self.mesh).to(self.device)
            for pack, length in zip(packs, lengths, strict=True)
        ]
        predictions = self.predict(shares)
        if predictions is None:
            features = packs[0].patches_LP.shape[1]
            full = [torch.empty(length, features, device=self.device) for length in lengths]
        else:
            full = [
                gather_shares(x.float(), share.context_split, self.mesh.context, pack.cu_segments, length)
                for x, share, pack, length in zip(predictions, shares, packs, lengths, strict=True)
            ]
        pipeline = self.mesh.pipeline
        if pipeline.is_split:
            for v_LP in full:
                dist.broadcast(v_LP, pipeline.global_rank(self.last_rank), group=pipeline.group)
        return full
