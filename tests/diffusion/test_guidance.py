"""Guidance: which predictions are needed, and how they are combined; references written out per token."""

import math

import pytest
import torch

from megasora.config import SampleConfig, load
from megasora.diffusion.guidance import CONTEXT, FREE, FULL, Guidance
from megasora.errors import MegaSoraError

LENGTHS, FEATURES = (5, 1, 8), 6  # tokens of three clips
SEGMENT_L = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
TOKENS = len(SEGMENT_L)
ALL = (FULL, CONTEXT, FREE)


def guidance(scale=4.0, context=1.0, interval=(0.0, 1.0), rescale=0.0, has_context=True):
    sample = SampleConfig(
        guidance_scale=scale,
        context_guidance_scale=context,
        guidance_interval=list(interval),
        guidance_rescale=rescale,
    )
    return Guidance(sample, has_context)


def velocities(branches=ALL):
    generator = torch.Generator().manual_seed(0)
    drawn = {branch: torch.randn(TOKENS, FEATURES, generator=generator) for branch in ALL}
    return {branch: drawn[branch] for branch in branches}


def timesteps(value=0.5):
    return torch.full((TOKENS, 1), value)


def combined(g, t_L1, is_noised_L=None):
    """With the branches that are asked for, and no others."""
    noised_L = torch.ones(TOKENS, dtype=torch.bool) if is_noised_L is None else is_noised_L
    return g.combine(velocities(g.branches(t_L1)), t_L1, SEGMENT_L, noised_L)


@pytest.mark.parametrize(
    ("scale", "context", "branches"),
    [
        (1.0, 1.0, (FULL,)),
        (4.0, 1.0, (FULL, CONTEXT)),
        (0.0, 1.0, (CONTEXT,)),
        (0.0, 0.0, (FREE,)),
        (0.0, 2.0, (CONTEXT, FREE)),
        (1.0, 2.0, (FULL, CONTEXT, FREE)),
        (4.0, 2.0, (FULL, CONTEXT, FREE)),
        (4.0, 0.0, (FULL, CONTEXT, FREE)),
        (4.0, 4.0, (FULL, FREE)),
    ],
)
def test_only_predictions_that_matter_are_computed_and_the_equation_holds(scale, context, branches):
    g = guidance(scale, context)
    assert g.branches(timesteps()) == branches and g.is_guided == (branches != (FULL,))
    v = velocities()
    expected = v[FREE] + context * (v[CONTEXT] - v[FREE]) + scale * (v[FULL] - v[CONTEXT])
    torch.testing.assert_close(combined(g, timesteps()), expected)


def test_without_clean_frames_the_context_scale_costs_nothing():
    g = guidance(4.0, 2.0, has_context=False)
    assert g.branches(timesteps()) == (FULL, CONTEXT)
    assert torch.equal(combined(g, timesteps()), combined(guidance(4.0, 1.0), timesteps()))


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_scale_one_is_the_conditional_prediction_bit_for_bit(rescale):
    assert torch.equal(combined(guidance(1.0, 1.0, rescale=rescale), timesteps()), velocities()[FULL])


@pytest.mark.parametrize(("scale", "context"), [(4.0, 1.0), (4.0, 2.0), (0.0, 2.0), (0.0, 0.0)])
def test_equal_predictions_are_returned_bit_for_bit(scale, context):
    g, v_LP = guidance(scale, context), velocities()[FULL]
    together = g.combine(dict.fromkeys(g.branches(timesteps()), v_LP), timesteps(), SEGMENT_L, SEGMENT_L >= 0)
    assert torch.equal(together, v_LP)


@pytest.mark.parametrize(("t", "is_guided"), [(0.1, False), (0.25, True), (0.5, True), (0.75, True), (0.8, False)])
@pytest.mark.parametrize(("scale", "context"), [(4.0, 1.0), (0.0, 1.0), (4.0, 2.0)])
def test_outside_of_the_interval_there_is_one_prediction_and_no_guidance(t, is_guided, scale, context):
    g, plain = guidance(scale, context, (0.25, 0.75)), guidance(scale, context)
    assert g.branches(timesteps(t)) == (plain.branches(timesteps(t)) if is_guided else (FULL,))
    expected = combined(plain, timesteps(t)) if is_guided else velocities()[FULL]
    assert torch.equal(combined(g, timesteps(t)), expected)


@pytest.mark.parametrize(("scale", "context"), [(4.0, 1.0), (0.0, 1.0), (4.0, 2.0)])
def test_each_token_is_guided_by_its_own_timestep(scale, context):
    g, t_L1 = guidance(scale, context, (0.25, 0.75)), torch.linspace(0.1, 0.9, TOKENS)[:, None]
    assert set(g.branches(t_L1)) == {FULL, *guidance(scale, context).branches(t_L1)}
    inside_L1 = (t_L1 >= 0.25) & (t_L1 <= 0.75)
    expected = torch.where(inside_L1, combined(guidance(scale, context), t_L1), velocities()[FULL])
    assert torch.equal(combined(g, t_L1), expected)


def test_clean_tokens_cost_no_call_whatever_the_interval():
    clean_L1 = torch.zeros(TOKENS, 1, dtype=torch.bool)
    clean_L1[:3] = True
    for interval, t, branches in (
        ((0.0, 0.5), 0.9, (FULL,)),
        ((0.5, 1.0), 0.9, (CONTEXT,)),
        ((0.0, 1.0), 0.0, (FULL,)),
    ):
        g = guidance(0.0, 1.0, interval)
        assert g.branches(torch.where(clean_L1, 0.0, timesteps(t))) == branches


@pytest.mark.parametrize("rescale", [0.3, 1.0])
@pytest.mark.parametrize(("scale", "context"), [(4.0, 1.0), (4.0, 2.0), (0.0, 1.0)])
def test_rescaling_moves_the_std_of_each_clip_towards_that_of_the_conditional_prediction(rescale, scale, context):
    noised_L = torch.ones(TOKENS, dtype=torch.bool)
    noised_L[[0, 1, 9]] = False
    guided, actual = (
        combined(guidance(scale, context), timesteps()),
        combined(guidance(scale, context, rescale=rescale), timesteps(), noised_L),
    )
    for segment in range(3):
        tokens = (SEGMENT_L == segment) & noised_L
        std_full, std = velocities()[FULL][tokens].std(), guided[tokens].std()
        expected = rescale * guided[tokens] * std_full / std + (1 - rescale) * guided[tokens]
        torch.testing.assert_close(actual[tokens], expected)
        if rescale == 1:
            torch.testing.assert_close(actual[tokens].std(), std_full)


def test_rescaling_ignores_undefined_predictions_at_padding_and_clips_without_noised_tokens():
    g, noised_L = guidance(rescale=0.7), SEGMENT_L != 1
    noised_L[-2:] = False  # padding counts to the last clip
    clean, undefined = velocities(), velocities()
    for v_LP in undefined.values():
        v_LP[-2:] = math.nan
    expected, actual = (g.combine(v, timesteps(), SEGMENT_L, noised_L) for v in (clean, undefined))
    assert torch.equal(actual[:-2], expected[:-2]) and actual[:-2].isfinite().all()


def test_rescaling_a_constant_prediction_changes_nothing():
    g, ones_LP = guidance(rescale=1.0), torch.ones(TOKENS, FEATURES)
    together = g.combine(
        {FULL: velocities()[FULL], CONTEXT: velocities()[FULL]}, timesteps(), SEGMENT_L, SEGMENT_L >= 0
    )
    torch.testing.assert_close(together, velocities()[FULL])
    assert torch.equal(g.combine({FULL: ones_LP, CONTEXT: ones_LP}, timesteps(), SEGMENT_L, SEGMENT_L >= 0), ones_LP)


@pytest.mark.parametrize("interval", ["[0.9,0.1]", "[0.5]", "[0,0.5,1]"])
def test_an_interval_that_is_none_is_refused(interval):
    with pytest.raises(MegaSoraError, match="sample.guidance_interval=.* must be two timesteps, the lower first"):
        load(None, [f"sample.guidance_interval={interval}"])
