"""Closed forms against what PyTorch counts on the module itself."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megasora.config import ModelConfig, TextConfig
from megasora.data.pack import Record, make_batch
from megasora.model.dit import VideoDiT
from megasora.model.flops import num_parameters, pack_flops
from megasora.text import build_text_encoder
from megasora.text.embedders import FeatureEmbedder

PATCH_DIM = 12
MODELS = {
    "block": ModelConfig(width=24, depth=3, heads=2, text_depth=2),
    "shared": ModelConfig(width=36, depth=2, heads=3, text_depth=1, modulation="shared", mlp_ratio=2.5),
    "without QK-norm": ModelConfig(width=16, depth=1, heads=2, text_depth=0, qk_norm="none", mlp_ratio=3.0),
}
each_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


def make_model(config):
    return VideoDiT(
        config, PATCH_DIM, build_text_encoder(TextConfig()).build_embedder(config.width, config.text_depth, 1)
    )


def make_pack(clips=3, grid=(2, 2, 3), caption="a red dot", text=None):
    """Clips of one size and captions of one length: nothing is padded."""
    tokens = grid[0] * grid[1] * grid[2]
    text = build_text_encoder(TextConfig()).encode([caption])[0] if text is None else text
    records = [
        Record(i, torch.randn(tokens, PATCH_DIM), grid, text, (8.0, 12.0, 5.0, 8.0), caption) for i in range(clips)
    ]
    return make_batch(records, clips * tokens)


def attention_flops(q, k, v, *others, **options):
    """q [B, N, Lq, K], k [B, N, Lk, K]: two products."""
    batch, heads, queries, dim = q
    return 4 * batch * heads * queries * k[2] * dim


def attention_backward_flops(grad, q, k, v, *others, **options):
    """Two products for each of the forward's; the one that is computed again does not count."""
    return 2 * attention_flops(q, k, v)


FUSED = {  # PyTorch has no count of its fused attention on a CPU
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def counted(function):
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        function()
    return counter.get_total_flops()


@each_model
@pytest.mark.parametrize(("clips", "grid"), [(1, (1, 1, 1)), (3, (2, 2, 3)), (2, (5, 3, 4))])
def test_forward_flops_are_the_ones_of_the_module(config, clips, grid):
    model, batch = make_model(config), make_pack(clips, grid)
    expected = counted(lambda: model(batch))
    assert pack_flops(config, PATCH_DIM, batch.cu_segments, batch.cu_text, training=False) == expected


def test_flops_of_features_of_another_width_are_the_ones_of_the_module():
    config = MODELS["block"]
    model = VideoDiT(config, PATCH_DIM, FeatureEmbedder(40, config.width, config.text_depth, 1))
    batch = make_pack(text=torch.randn(7, 40))
    ours = pack_flops(config, PATCH_DIM, batch.cu_segments, batch.cu_text, text_dim=40, training=False)
    assert ours == counted(lambda: model(batch))


@each_model
def test_training_is_three_times_the_forward(config):
    model, batch = make_model(config), make_pack(grid=(4, 4, 4))
    forward = pack_flops(config, PATCH_DIM, batch.cu_segments, batch.cu_text, training=False)
    training = pack_flops(config, PATCH_DIM, batch.cu_segments, batch.cu_text)
    assert training == 3 * forward
    # the counter has no gradients of what the data gave: patches, timesteps, native sizes
    measured = counted(lambda: model(batch).sum().backward())
    assert 0.97 * training < measured < training


@each_model
def test_recompute_is_not_counted(config):
    batch = make_pack()
    again = ModelConfig(**{**vars(config), "recompute": "full"})
    assert pack_flops(again, PATCH_DIM, batch.cu_segments, batch.cu_text) == pack_flops(
        config, PATCH_DIM, batch.cu_segments, batch.cu_text
    )


def test_a_pack_is_the_sum_of_its_clips():
    config = MODELS["shared"]
    video, text = torch.tensor([0, 12, 100, 101]), torch.tensor([0, 3, 3, 9])
    alone = [
        pack_flops(config, PATCH_DIM, torch.tensor([0, n]), torch.tensor([0, s]))
        for n, s in zip(video.diff().tolist(), text.diff().tolist(), strict=True)
    ]
    assert pack_flops(config, PATCH_DIM, video, text) == sum(alone)


def test_another_row_costs_its_timestep_and_modulation():
    config, cu = MODELS["block"], torch.tensor([0, 12])
    one, two = (pack_flops(config, PATCH_DIM, cu, cu, num_rows=rows, training=False) for rows in (1, 2))
    d = config.width
    assert two - one == config.depth * 12 * d * d + 4 * d * d + 2 * (256 * d + d * d)


def test_a_large_model_agrees_with_the_published_formula():
    # forward, a token: 2 L [4 d^2 + 2 d ff + 2 d^2 + 2 d^2 S_txt/S + 2 S d + 2 S_txt d]
    config = ModelConfig(width=5120, depth=40, heads=40, mlp_ratio=2.7, modulation="shared", text_depth=0)
    d, ff, depth, s, words = 5120, 13824, 40, 37_000, 512
    formula = 2 * depth * s * (4 * d * d + 2 * d * ff + 2 * d * d + 2 * d * d * words / s + 2 * s * d + 2 * words * d)
    ours = pack_flops(config, 64, torch.tensor([0, s]), torch.tensor([0, words]), training=False)
    assert ours == pytest.approx(formula, rel=2e-3)


@each_model
def test_parameters_are_the_ones_of_the_module(config):
    with torch.device("meta"):
        model = make_model(config)
    assert all(p.is_meta for p in model.parameters())
    expected = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("text."))
    assert num_parameters(config, PATCH_DIM) == expected
