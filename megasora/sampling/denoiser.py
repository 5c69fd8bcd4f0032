"""The model as sampling calls it: noised packs in, velocities out, on one process or on many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megasora.batch import VideoBatch


class Denoiser(Protocol):
    """The model as sampling calls it, on one process or on many."""

    device: torch.device
    stages: Sequence[torch.nn.Module]  # the model, or this rank's pipeline stages of it

    def __call__(self, batches: list[VideoBatch]) -> list[Tensor]:
        """Velocities fp32 [L, P] of noised packs, on every rank that shares them."""

    def pad_tokens(self, tokens: int) -> int:
        """The length of a pack with so many tokens."""


class LocalDenoiser:
    """The whole model in this process. `device`: auto is a GPU, if there is one."""

    def __init__(self, model: torch.nn.Module, device: str = "auto"):
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.stages = [self.model]

    def __call__(self, batches: list[VideoBatch]) -> list[Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return [self.model(batch) for batch in batches]

    def pad_tokens(self, tokens: int) -> int:
        return tokens
