"""Sampling in packs: the result of a prompt does not depend on the other prompts."""

import dataclasses

import pytest
import torch

from megasora.batch import segment_ids
from megasora.config import ModelConfig, ObjectiveConfig, SampleConfig, TextConfig
from megasora.data.pack import Record, make_batch
from megasora.diffusion.flow import build_rows
from megasora.diffusion.samplers import integrate, timestep_grid
from megasora.diffusion.timesteps import shift_factor
from megasora.model.dit import VideoDiT
from megasora.sampling.generate import Prompt, generate, num_model_calls
from megasora.text import build_text_encoder

PATCH_DIM = 5  # odd, so that the noise's pairs do not divide it
OBJECTIVE = ObjectiveConfig(shift_tokens=4)
PROMPTS = {  # sample id -> grid, caption, clean latent frames
    3: ((3, 2, 2), "a red circle", (1, 0)),
    1: ((1, 3, 2), "an image", (0, 0)),
    8: ((2, 2, 3), "two squares move slowly", (0, 1)),
    4: ((5, 1, 2), "up", (1, 2)),
    6: ((2, 2, 2), "", (0, 0)),
}
SOLVERS = pytest.mark.parametrize("solver", ["euler", "heun"])


def make_prompt(sample_id):
    grid, caption, clean = PROMPTS[sample_id]
    tokens = grid[0] * grid[1] * grid[2]
    patches = torch.randn(tokens, PATCH_DIM, generator=torch.Generator().manual_seed(sample_id))
    text = build_text_encoder(TextConfig()).encode([caption])[0]
    native = (8.0 * grid[1], 8.0 * grid[2], 4.0 * grid[0] - 3, 12.0)
    return Prompt(Record(sample_id, patches, grid, text, native, caption), clean)


def make_model():
    torch.manual_seed(0)
    config = ModelConfig(width=24, depth=2, heads=2)
    model = VideoDiT(config, PATCH_DIM, build_text_encoder(TextConfig()).build_embedder(24, 1, 2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def simple_model(batch):
    """A velocity without sums over tokens, so that packing changes no bit."""
    t_L = batch.timesteps_R[segment_ids(batch.cu_rows, len(batch.patches_LP))]
    segment_L = segment_ids(batch.cu_segments, len(batch.patches_LP))
    clip_G = batch.native_size_G4[:, 0] / 16 + torch.where(batch.drop_text_G, 0.0, 1.0)
    return 0.5 * batch.patches_LP + t_L[:, None] + clip_G[segment_L, None]


def run(model, ids, seed=0, **options):
    sample = SampleConfig(**{"num_inference_steps": 4, "guidance_scale": 3.0, **options})
    return dict(zip(ids, generate(model, [make_prompt(i) for i in ids], OBJECTIVE, sample, seed), strict=True))


def sample_alone(model, sample_id, sample, start):
    """One prompt without guidance, without `generate`."""
    prompt = make_prompt(sample_id)
    batch = make_batch([prompt.record], len(prompt.record.patches_LP))
    cu_rows, timesteps_R, segment_R = build_rows(batch, torch.ones(1), [prompt.clean])
    row_L = segment_ids(cu_rows, len(batch.patches_LP))
    is_noised = (timesteps_R[row_L] > 0)[:, None]
    factor = shift_factor(batch.cu_segments.diff(), OBJECTIVE).float()
    grid = timestep_grid(sample.num_inference_steps, factor.expand(len(row_L))[:, None])
    timesteps = [t * is_noised for t in grid]

    def velocity(x, t_L1):
        t_R = t_L1[cu_rows[:-1].long(), 0]
        return model(
            dataclasses.replace(batch, patches_LP=x, cu_rows=cu_rows, row_segment_R=segment_R, timesteps_R=t_R)
        )

    with torch.no_grad():
        return integrate(velocity, torch.where(is_noised, start, batch.patches_LP), timesteps, sample.solver)


def noise_of(sample_id, seed=0):
    """The initial noise of sampling, which a zero velocity returns unchanged."""
    prompt = make_prompt(sample_id)
    prompt = dataclasses.replace(prompt, clean=(0, 0))
    return generate(
        lambda b: torch.zeros_like(b.patches_LP), [prompt], OBJECTIVE, SampleConfig(num_inference_steps=1), seed
    )[0]


@SOLVERS
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_sample_does_not_depend_on_the_other_prompts(solver, guidance):
    together = run(simple_model, list(PROMPTS), solver=solver, guidance_scale=guidance)
    for ids in ([3], [4, 1], list(PROMPTS)[::-1]):
        fewer = run(simple_model, ids, solver=solver, guidance_scale=guidance)
        assert all(torch.equal(fewer[i], together[i]) for i in ids)


def test_a_sample_of_the_real_model_does_not_depend_on_the_other_prompts():
    model = make_model()
    together = run(model, list(PROMPTS))
    for i in PROMPTS:
        torch.testing.assert_close(run(model, [i])[i], together[i], rtol=1e-4, atol=1e-4)


def test_noise_is_a_function_of_seed_and_sample_id():
    assert torch.equal(noise_of(1), noise_of(1))
    others = [noise_of(1, seed=1), noise_of(8)[:6], noise_of(3)[:6]]
    assert not any(torch.isclose(noise_of(1), other).any() for other in others)
    assert len(noise_of(3).unique()) == noise_of(3).numel()
    x = torch.cat([noise_of(i, seed) for i in PROMPTS for seed in range(20)])
    assert abs(float(x.mean())) < 0.05 and float(x.std()) == pytest.approx(1, abs=0.05)


@SOLVERS
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_only_clean_frames_are_returned_unchanged(solver, guidance):
    results = run(make_model(), list(PROMPTS), solver=solver, guidance_scale=guidance)
    for i, (grid, _, (head, tail)) in PROMPTS.items():
        prompt_frames = make_prompt(i).record.patches_LP.view(grid[0], -1, PATCH_DIM)
        frames = results[i].view(grid[0], -1, PATCH_DIM)
        clean = torch.tensor([t < head or t >= grid[0] - tail for t in range(grid[0])])
        assert torch.equal(frames[clean], prompt_frames[clean])
        assert not torch.isclose(frames[~clean], prompt_frames[~clean]).all(-1).any()


@SOLVERS
def test_guidance_scale_one_is_conditional_sampling(solver):
    model = make_model()
    results = run(model, list(PROMPTS), solver=solver, guidance_scale=1.0)
    for i in PROMPTS:
        expected = sample_alone(model, i, SampleConfig(num_inference_steps=4, solver=solver), noise_of(i))
        torch.testing.assert_close(results[i], expected, rtol=1e-4, atol=1e-4)


def test_guidance_is_continuous_at_one_where_the_pack_has_no_unconditional_half():
    model = make_model()
    conditional, guided = (run(model, list(PROMPTS), guidance_scale=g) for g in (1.0, 1.0 + 1e-6))
    for i in PROMPTS:
        torch.testing.assert_close(conditional[i], guided[i], rtol=1e-4, atol=1e-4)


def test_guidance_extrapolates_from_the_unconditional_to_the_conditional_velocity():
    # one Euler step of simple_model: the velocities differ by 1 in each element of a noised frame
    step = {
        g: run(simple_model, [1], solver="euler", num_inference_steps=1, guidance_scale=g)[1] for g in (0.0, 1.0, 2.5)
    }
    torch.testing.assert_close(step[0.0] - step[1.0], torch.ones(6, PATCH_DIM))
    torch.testing.assert_close(step[1.0] - step[2.5], torch.full((6, PATCH_DIM), 1.5))


def test_guidance_scale_zero_ignores_the_caption_and_an_empty_caption_ignores_guidance():
    model = make_model()
    record = dataclasses.replace(make_prompt(1).record, text_SE=make_prompt(8).record.text_SE, caption="other")
    sample = SampleConfig(num_inference_steps=4, guidance_scale=0.0)
    other = generate(model, [Prompt(record)], OBJECTIVE, sample, 0)[0]
    torch.testing.assert_close(other, run(model, [1], guidance_scale=0.0)[1], rtol=1e-4, atol=1e-4)
    conditional, guided = (run(model, [6], guidance_scale=g)[6] for g in (1.0, 5.0))
    torch.testing.assert_close(conditional, guided, rtol=1e-4, atol=1e-4)


@SOLVERS
def test_a_larger_clip_has_larger_timesteps(solver):
    timesteps = {}

    def model(batch):
        for row, segment in enumerate(batch.row_segment_R.tolist()):
            timesteps.setdefault(int(batch.sample_ids_G[segment]), []).append(float(batch.timesteps_R[row]))
        return torch.zeros_like(batch.patches_LP)

    run(model, [1, 8], solver=solver, guidance_scale=1.0)
    small, large = timesteps[1], timesteps[8][::2]  # 6 and 12 tokens; the second row of 8 is its clean frame
    assert small[0] == large[0] == 1 and set(timesteps[8][1::2]) == {0.0}
    assert all(a < b for a, b in zip(small[1:], large[1:], strict=True))


@SOLVERS
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_progress_is_called_after_each_model_call(solver, guidance):
    calls, steps = [], 4
    sample = SampleConfig(num_inference_steps=steps, solver=solver, guidance_scale=guidance)
    generate(simple_model, [make_prompt(1)], OBJECTIVE, sample, 0, progress=lambda: calls.append(1))
    assert len(calls) == num_model_calls(sample) == (steps if solver == "euler" else 2 * steps - 1)


def test_the_exact_velocity_of_a_single_datum_samples_it_exactly():
    datum = {i: torch.randn(make_prompt(i).record.patches_LP.shape) for i in (1, 6)}

    def model(batch):
        target = torch.cat([datum[int(i)] for i in batch.sample_ids_G])
        t_L1 = batch.timesteps_R[segment_ids(batch.cu_rows, len(target))][:, None]
        return (batch.patches_LP - target) / t_L1

    for i, result in run(model, [1, 6]).items():
        torch.testing.assert_close(result, datum[i], rtol=0, atol=1e-5)
