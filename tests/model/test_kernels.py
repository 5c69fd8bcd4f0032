"""Training with the Triton kernels (in the interpreter without a GPU) compared with training in PyTorch."""

import pytest
import torch

from megasora.config import Config, ModelConfig, TextConfig
from megasora.data.pack import Record, make_batch
from megasora.diffusion.flow import FlowMatching, velocity_error
from megasora.model.dit import VideoDiT
from megasora.text import build_text_encoder

PATCH_DIM, STEPS = 6, 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DIALECTS = {
    "DiT": {"modulation": "block", "qk_norm": "per_head"},
    "Wan": {"modulation": "shared", "qk_norm": "across_heads"},
    "no norm, recompute": {"modulation": "block", "qk_norm": "none", "recompute": "keep_attention"},
}


def make_pack():
    """An image, two videos and some padding."""
    records = []
    for index, (grid, caption) in enumerate([((1, 3, 2), "an image"), ((3, 2, 2), "a red circle"), ((2, 2, 2), "")]):
        draw = torch.Generator().manual_seed(index)
        patches = torch.randn(grid[0] * grid[1] * grid[2], PATCH_DIM, generator=draw)
        text = build_text_encoder(TextConfig()).encode([caption])[0]
        records.append(Record(index, patches, grid, text, (16.0, 16.0, 4.0 * grid[0] - 3, 8.0), caption))
    return make_batch(records, 30)


def losses(kernel_backend, dialect):
    options = ModelConfig(width=24, depth=1, heads=2, kernel_backend=kernel_backend, **DIALECTS[dialect])
    embedder = build_text_encoder(TextConfig()).build_embedder(24, options.text_depth, 2)
    model = VideoDiT(options, PATCH_DIM, embedder)
    model.initialise(0)
    model.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-5)
    objective, pack, values = FlowMatching(Config().objective, seed=0), make_pack().to(DEVICE), []
    for step in range(STEPS):
        noised, target, weight = objective.add_noise(pack, step)
        sums = velocity_error(model(noised), target, weight)
        loss = sums.squared_error_sum / sums.tokens
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    return values


@pytest.mark.parametrize("dialect", DIALECTS)
def test_losses_of_ten_steps_equal_those_in_pytorch(dialect):
    expected = losses("torch", dialect)
    assert losses("triton", dialect) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < 0.9 * expected[0]  # the model learns
