"""A VideoDiT with other rotary frequencies: the whole model and its pipeline stages, while a context is open."""

import copy
import dataclasses

import pytest
import torch

from megasora.batch import grid_coords
from megasora.config import ModelConfig, TextConfig
from megasora.data.pack import Record, make_batch
from megasora.model.dit import VideoDiT
from megasora.sampling.rope import scaled_rope
from megasora.text import build_text_encoder

TRAINED, GRID = (5, 1, 2), (20, 2, 2)


def make_model(**options):
    config = ModelConfig(width=32, depth=2, heads=1, **options)
    torch.manual_seed(0)
    model = VideoDiT(config, 6, build_text_encoder(TextConfig()).build_embedder(32, config.text_depth, 1))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


@pytest.fixture(scope="module")
def batch():
    text = build_text_encoder(TextConfig()).encode(["a red circle"])[0]
    patches = torch.randn(len(grid_coords(GRID)), 6, generator=torch.Generator().manual_seed(0))
    return make_batch([Record(0, patches, GRID, text, (16.0, 16.0, 77.0, 12.0), "a red circle")], len(patches))


def run(model, batch):
    with torch.no_grad():
        return model(batch)


def test_none_changes_no_bit_and_the_frequencies_are_restored_also_after_an_error(batch):
    model = make_model()
    plain = run(model, batch)
    with scaled_rope([model], "none", TRAINED, GRID):
        assert torch.equal(run(model, batch), plain)
    with pytest.raises(RuntimeError, match="stop"), scaled_rope([model], "riflex", TRAINED, GRID):
        assert not torch.allclose(run(model, batch), plain)
        raise RuntimeError("stop")
    assert torch.equal(run(model, batch), plain)


def test_packs_that_a_loader_plans_meanwhile_keep_the_frequencies_of_training(batch):
    model = make_model()
    plan, plain = model.plan(batch), run(model, batch)
    with scaled_rope([model], "riflex", TRAINED, GRID):
        planned = dataclasses.replace(batch, plan=model.plan(batch))
        assert torch.equal(planned.plan.rope.frequency_P, plan.rope.frequency_P)
        assert torch.equal(run(model, planned), plain) and not torch.allclose(run(model, batch), plain)


def test_ntk_is_the_model_with_the_ntk_factors_of_the_larger_axes(batch):
    model, other = make_model(), make_model(rope_ntk_factor=[4.0, 2.0, 1.0])
    with scaled_rope([model], "ntk", TRAINED, GRID):
        assert torch.equal(run(model, batch), run(other, batch))


def test_pipeline_stages_give_what_the_whole_model_gives(batch):
    model = make_model()
    stages = [copy.deepcopy(model), copy.deepcopy(model)]
    for i, stage in enumerate(stages):
        stage.keep_stage(i, 1)
    with scaled_rope([model, *stages], "riflex", TRAINED, GRID), torch.no_grad():
        torch.testing.assert_close(stages[1](batch, stages[0](batch)), model(batch))
