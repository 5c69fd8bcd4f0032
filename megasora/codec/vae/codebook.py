"""The codebook of vq: its codes are moving averages of the vectors that are nearest to them.

    N_k <- decay N_k + (1 - decay) n_k        n_k: vectors of the step with code k
    m_k <- decay m_k + (1 - decay) s_k        s_k: their sum
    e_k  = m_k / N_k                          N_k with Laplace smoothing

[VQ-VAE, arXiv 1711.00937, appendix A.1]. Codes that are hardly used restart at vectors of the step [Jukebox, arXiv
2005.00341]. n and s are sums over all micro-batches and ranks, so every rank and layout has the same codebook:

    forward passes --collect--> CodeStatistics --all_reduce--> update
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMOOTHING = 1e-5  # Laplace smoothing of the counts, vectors per step
MAX_DISTANCES = 1 << 22  # distances of vectors and codes that are in memory at once


@dataclass(frozen=True)
class CodeStatistics:
    """Sums over the vectors of some pieces; K codes of D channels. They add up: `+` over micro-batches, then
    `all_reduce` over ranks.

    The random numbers of a vector are a slot, from 0 to K - 1, and a priority. Each slot keeps the vector with the
    lowest priority, so which one depends on all vectors of the step but not on which rank had them.
    """

    counts_K: Tensor
    sums_KD: Tensor
    priority_K: Tensor  # lowest of the slot; infinite if it has no vector
    owners_K: Tensor  # number of vectors with this priority: 0 or 1, more if their random numbers are equal
    candidates_KD: Tensor  # their sum

    def __add__(self, other: CodeStatistics) -> CodeStatistics:
        first, second = self.packed(other.priority_K), other.packed(self.priority_K)
        return unpack(torch.minimum(self.priority_K, other.priority_K), first + second)

    def all_reduce(
        self, reduce_min: Callable[[Tensor], Tensor], reduce_sum: Callable[[Tensor], Tensor]
    ) -> CodeStatistics:
        """The sum over ranks, given the all-reduces over all ranks that have different latents."""
        priority = reduce_min(self.priority_K)
        return unpack(priority, reduce_sum(self.packed(priority)))

    def packed(self, priority_K: Tensor) -> Tensor:
        """[K, 2 + 2 D]: all sums, without the candidates of a higher priority than `priority_K`."""
        lowest = (self.priority_K <= priority_K)[:, None]
        owners, candidates = self.owners_K[:, None] * lowest, self.candidates_KD * lowest
        return torch.cat([self.counts_K[:, None], owners, self.sums_KD, candidates], dim=1)


def unpack(priority_K: Tensor, packed: Tensor) -> CodeStatistics:
    """The inverse of CodeStatistics.packed."""
    channels = (packed.shape[1] - 2) // 2
    counts, owners, sums, candidates = packed.split([1, 1, channels, channels], dim=1)
    return CodeStatistics(counts[:, 0], sums, priority_K, owners[:, 0], candidates)


class Codebook(nn.Module):
    """K codes of D channels and their averages: buffers, in fp32 also where the network is converted to bf16.

    `codes` is not initialised, see network.init_weights. The averages start at 0, so the first update sets each code to
    the mean of its vectors, and those without any to a vector of the batch.
    """

    def __init__(self, size: int, channels: int, decay: float, dead_code_usage: float):
        super().__init__()
        self.decay, self.dead_code_usage = decay, dead_code_usage
        self.register_buffer("codes", torch.empty(size, channels))
        self.register_buffer("usage", torch.zeros(size))  # N, vectors per step
        self.register_buffer("sums", torch.zeros(size, channels))  # m
        self.collected: CodeStatistics | None = None

    def _apply(self, fn, recurse=True):
        """Conversions to a dtype below fp32 move the buffers only."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer.dtype != (dtype := torch.promote_types(buffer.dtype, torch.float32)):
                self._buffers[name] = before[name].to(buffer.device, dtype)
        return self

    def nearest(self, x: Tensor) -> Tensor:
        """[B, D, T, H, W] -> int64 [B, T, H, W]: the code with the least squared distance."""
        vectors = x.movedim(1, -1)
        codes = self.codes.to(x.dtype)
        half_norms = codes.square().sum(1) / 2
        rows = vectors.reshape(-1, len(codes[0])).split(max(1, MAX_DISTANCES // len(codes)))
        nearest = [torch.addmm(half_norms, part, codes.T, alpha=-1).argmin(1) for part in rows]
        return torch.cat(nearest).view(vectors.shape[:-1])

    def vectors(self, codes: Tensor) -> Tensor:
        """int64 [B, T, H, W] -> [B, D, T, H, W]."""
        return F.embedding(codes, self.codes).movedim(-1, 1)

    @torch.no_grad()
    def collect(self, x: Tensor, codes: Tensor, noise: Tensor) -> None:
        """Adds the vectors x [B, D, T, H, W] with their codes to the statistics of this step.

        `noise`: [B, D, T, H, W], standard normal, keyed by clip and position. Its first two channels give each vector
        its slot and priority.
        """
        size, channels = self.codes.shape
        x_ND, codes_N = x.movedim(1, -1).reshape(-1, channels), codes.flatten()
        counts, sums = x.new_zeros(size), x.new_zeros(size, channels)
        for part, part_codes in zip(
            *(values.split(max(1, MAX_DISTANCES // size)) for values in (x_ND, codes_N)), strict=True
        ):
            one_hot = F.one_hot(part_codes, size).to(x.dtype)  # a product: sums in a fixed order also on a GPU
            counts, sums = counts + one_hot.sum(0), sums + one_hot.T @ part
        slot_N = (torch.special.ndtr(noise[:, 0].double()) * size).long().clamp_max(size - 1).flatten()
        priority_N = noise[:, 1].to(x.dtype).flatten()
        priority = x.new_full((size,), torch.inf).scatter_reduce(0, slot_N, priority_N, "amin")
        first = priority_N == priority[slot_N]
        owners = x.new_zeros(size).index_add(0, slot_N[first], torch.ones_like(priority_N[first]))
        candidates = torch.zeros_like(sums).index_add(0, slot_N[first], x_ND[first])
        batch = CodeStatistics(counts, sums, priority, owners, candidates)
        self.collected = batch if self.collected is None else self.collected + batch

    def take_statistics(self) -> CodeStatistics:
        """The statistics since the last call; call it also for a step that is left out."""
        statistics, self.collected = self.collected, None
        if statistics is None:
            zeros = torch.zeros_like(self.usage)
            statistics = CodeStatistics(
                zeros, torch.zeros_like(self.sums), zeros + torch.inf, zeros, torch.zeros_like(self.sums)
            )
        return statistics

    @torch.no_grad()
    def update(self, statistics: CodeStatistics) -> Tensor:
        """Updates the codes in place, given the sums over all ranks, which must be finite. Returns the number of
        restarts, int64 []."""
        self.usage.lerp_(statistics.counts_K.to(self.usage.dtype), 1 - self.decay)
        self.sums.lerp_(statistics.sums_KD.to(self.sums.dtype), 1 - self.decay)
        total, size = self.usage.sum(), len(self.usage)
        smoothed = (self.usage + SMOOTHING) / (total + size * SMOOTHING) * total
        used = (self.usage > 0)[:, None]
        self.codes.copy_(torch.where(used, self.sums / smoothed[:, None], self.codes))

        mean = total / size
        dead = (self.usage < self.dead_code_usage * mean) & (statistics.owners_K > 0)
        vectors = (statistics.candidates_KD / statistics.owners_K[:, None]).to(self.codes.dtype)
        self.codes.copy_(torch.where(dead[:, None], vectors, self.codes))
        self.sums.copy_(torch.where(dead[:, None], mean * vectors, self.sums))
        self.usage.copy_(torch.where(dead, mean, self.usage))
        return dead.sum()
