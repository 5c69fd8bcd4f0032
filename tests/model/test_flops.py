"""The closed forms equal what PyTorch counts on the module."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megasora.config import ModelConfig, TextConfig
from megasora.data.pack import Record, make_batch
from megasora.model.dit import VideoDiT
from megasora.model.flops import attention_break_even_tokens, num_parameters, pack_flops
from megasora.text import build_text_encoder
from megasora.text.embedders import FeatureEmbedder

PATCH_DIM = 12
MODELS = {
    "block": ModelConfig(width=24, depth=3, heads=2, text_depth=2),
    "shared": ModelConfig(width=36, depth=2, heads=3, text_depth=1, modulation="shared", mlp_ratio=2.5),
    "timestep": ModelConfig(width=24, depth=2, heads=2, modulation="shared", conditioning="timestep"),
    "without QK-norm": ModelConfig(width=16, depth=1, heads=2, text_depth=0, qk_norm="none", mlp_ratio=3.0),
}
each_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


def make_model(config):
    return VideoDiT(
        config, PATCH_DIM, build_text_encoder(TextConfig()).build_embedder(config.width, config.text_depth, 1)
    )


def make_pack(clips=3, grid=(2, 2, 3), caption="a red dot", text=None):
    """Clips of one size with captions of one length, without padding."""
    tokens = grid[0] * grid[1] * grid[2]
    text = build_text_encoder(TextConfig()).encode([caption])[0] if text is None else text
    records = [
        Record(i, torch.randn(tokens, PATCH_DIM), grid, text, (8.0, 12.0, 5.0, 8.0), caption) for i in range(clips)
    ]
    return make_batch(records, clips * tokens)


def attention_flops(q, k, v, *others, **options):
    """q [B, N, Lq, K], k [B, N, Lk, K]: two matrix products."""
    batch, heads, queries, dim = q
    return 4 * batch * heads * queries * k[2] * dim


def attention_backward_flops(grad, q, k, v, *others, **options):
    """Two matrix products for each of the forward pass; the recomputed one is not counted."""
    return 2 * attention_flops(q, k, v)


FUSED = {  # PyTorch does not count its fused attention on a CPU
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def counted(function):
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
        function()
    return counter.get_total_flops()


@each_model
@pytest.mark.parametrize(("clips", "grid"), [(1, (1, 1, 1)), (3, (2, 2, 3)), (2, (5, 3, 4))])
def test_forward_flops_equal_those_of_the_module(config, clips, grid):
    model, batch = make_model(config), make_pack(clips, grid)
    expected = counted(lambda: model(batch))
    assert pack_flops(config, PATCH_DIM, batch.cu_segments, batch.cu_text, training=False) == expected


def test_flops_of_text_features_of_another_width_equal_those_of_the_module():
    config = MODELS["block"]
    model = VideoDiT(config, PATCH_DIM, FeatureEmbedder(40, config.width, config.text_depth, 1))
    batch = make_pack(text=torch.randn(7, 40))
    flops = pack_flops(config, PATCH_DIM, batch.cu_segments, batch.cu_text, text_dim=40, training=False)
    assert flops == counted(lambda: model(batch))


@each_model
def test_training_is_three_times_the_forward(config):
    model, batch = make_model(config), make_pack(grid=(4, 4, 4))
    forward = pack_flops(config, PATCH_DIM, batch.cu_segments, batch.cu_text, training=False)
    training = pack_flops(config, PATCH_DIM, batch.cu_segments, batch.cu_text)
    assert training == 3 * forward
    # inputs (patches, timesteps, native sizes) need no gradient, which the counter does not count
    measured = counted(lambda: model(batch).sum().backward())
    assert 0.97 * training < measured < training


@each_model
def test_recompute_is_not_counted(config):
    batch = make_pack()
    recomputing = ModelConfig(**{**vars(config), "recompute": "full"})
    assert pack_flops(recomputing, PATCH_DIM, batch.cu_segments, batch.cu_text) == pack_flops(
        config, PATCH_DIM, batch.cu_segments, batch.cu_text
    )


def test_flops_of_a_pack_are_the_sum_over_its_clips():
    config = MODELS["shared"]
    video, text = torch.tensor([0, 12, 100, 101]), torch.tensor([0, 3, 3, 9])
    alone = [
        pack_flops(config, PATCH_DIM, torch.tensor([0, n]), torch.tensor([0, s]))
        for n, s in zip(video.diff().tolist(), text.diff().tolist(), strict=True)
    ]
    assert pack_flops(config, PATCH_DIM, video, text) == sum(alone)


def test_an_additional_row_costs_its_timestep_embedding_and_modulation():
    config, cu = MODELS["block"], torch.tensor([0, 12])
    one, two = (pack_flops(config, PATCH_DIM, cu, cu, num_rows=rows, training=False) for rows in (1, 2))
    d = config.width
    assert two - one == config.depth * 12 * d * d + 4 * d * d + 2 * (256 * d + d * d)


def test_a_large_model_agrees_with_the_published_formula():
    # forward, per token: 2 L [4 d^2 + 2 d ff + 2 d^2 + 2 d^2 S_txt/S + 2 S d + 2 S_txt d]
    config = ModelConfig(width=5120, depth=40, heads=40, mlp_ratio=2.7, modulation="shared", text_depth=0)
    d, ff, depth, s, words = 5120, 13824, 40, 37_000, 512
    formula = 2 * depth * s * (4 * d * d + 2 * d * ff + 2 * d * d + 2 * d * d * words / s + 2 * s * d + 2 * words * d)
    flops = pack_flops(config, 64, torch.tensor([0, s]), torch.tensor([0, words]), training=False)
    assert flops == pytest.approx(formula, rel=2e-3)


def test_self_attention_costs_as_much_as_all_else_at_the_break_even_tokens():
    config = ModelConfig(width=64, depth=2, heads=2)
    tokens = attention_break_even_tokens(config, PATCH_DIM)

    def flops(num_tokens):
        return pack_flops(config, PATCH_DIM, torch.tensor([0, num_tokens]), torch.tensor([0, 0]))

    attention = 3 * config.depth * 4 * config.width * tokens**2
    other = flops(tokens) - flops(0) - attention
    assert attention == pytest.approx(other, rel=1 / tokens)


@each_model
def test_number_of_parameters_equals_that_of_the_module(config):
    with torch.device("meta"):
        model = make_model(config)
    assert all(p.is_meta for p in model.parameters())
    expected = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("text."))
    assert num_parameters(config, PATCH_DIM) == expected
