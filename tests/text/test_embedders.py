"""The attention of captions uses the backend and the order of sums of the configuration."""

import pytest
import torch

from megasora.build import build_model
from megasora.config import Config
from megasora.kernels.attention import attention, prepare
from megasora.text import embedders

SETTINGS = [("math", True), ("sdpa", False), ("auto", True)]


@pytest.mark.parametrize(("backend", "deterministic"), SETTINGS)
def test_captions_use_the_attention_backend_and_order_of_sums_of_the_model(monkeypatch, backend, deterministic):
    used = []

    def record(*inputs, backend, deterministic):
        used.append((backend, deterministic))
        return attention(*inputs, backend=backend, deterministic=deterministic)

    def record_prepare(segments, q, backend, deterministic):
        used.append((backend, deterministic))
        prepare(segments, q, backend, deterministic)

    monkeypatch.setattr(embedders, "attention", record)
    monkeypatch.setattr(embedders, "prepare", record_prepare)
    config = Config()
    model = config.model
    model.width, model.depth, model.heads, model.text_depth = 16, 1, 2, 2
    model.attention_backend, model.deterministic = backend, deterministic
    (embedder,) = [m for m in build_model(config, 4).modules() if isinstance(m, embedders.BytesEmbedder)]
    words = torch.randint(0, 256, (5, 16))
    embedder(words, embedder.plan(torch.tensor([0, 2, 5], dtype=torch.int32))).sum().backward()
    assert used == [(backend, deterministic)] * 3  # the plan, and two blocks
