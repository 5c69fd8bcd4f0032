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
from megasora.sampling.generate import ClipPrompt, generate, num_evaluations
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
SOLVERS = pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "unipc"])


def make_prompt(sample_id, seed=0):
    grid, caption, (head, tail) = PROMPTS[sample_id]
    tokens = grid[0] * grid[1] * grid[2]
    patches = torch.randn(tokens, PATCH_DIM, generator=torch.Generator().manual_seed(sample_id))
    text = build_text_encoder(TextConfig()).encode([caption])[0]
    native = (8.0 * grid[1], 8.0 * grid[2], 4.0 * grid[0] - 3, 12.0)
    start_T = torch.ones(grid[0])
    start_T[:head] = start_T[grid[0] - tail :] = 0
    return ClipPrompt(Record(sample_id, patches, grid, text, native, caption), start_T, seed=seed)


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
    return dict(
        zip(ids, generate(one_by_one(model), [make_prompt(i, seed) for i in ids], OBJECTIVE, sample), strict=True)
    )


def one_by_one(model):
    """The model as `generate` calls it: with a list of packs."""
    return lambda batches: [model(batch) for batch in batches]


def sample_alone(model, sample_id, sample, start):
    """One prompt without guidance, without `generate`."""
    prompt = make_prompt(sample_id)
    batch = make_batch([prompt.record], len(prompt.record.patches_LP))
    cu_rows, timesteps_R, segment_R = build_rows(batch, torch.ones(1), [PROMPTS[sample_id][2]])
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
    prompt = ClipPrompt.of_text(make_prompt(sample_id).record, seed)
    model = one_by_one(lambda b: torch.zeros_like(b.patches_LP))
    return generate(model, [prompt], OBJECTIVE, SampleConfig(num_inference_steps=1, solver="euler"))[0]


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
    other = generate(one_by_one(model), [ClipPrompt.of_text(record)], OBJECTIVE, sample)[0]
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
    prompts = [make_prompt(1)]
    generate(one_by_one(simple_model), prompts, OBJECTIVE, sample, progress=lambda: calls.append(1))
    expected = 2 * steps - 1 if solver == "heun" else steps
    assert len(calls) == num_evaluations(prompts, OBJECTIVE, sample) == expected


def test_the_exact_velocity_of_a_single_datum_samples_it_exactly():
    datum = {i: torch.randn(make_prompt(i).record.patches_LP.shape) for i in (1, 6)}

    def model(batch):
        target = torch.cat([datum[int(i)] for i in batch.sample_ids_G])
        t_L1 = batch.timesteps_R[segment_ids(batch.cu_rows, len(target))][:, None]
        return (batch.patches_LP - target) / t_L1

    for i, result in run(model, [1, 6]).items():
        torch.testing.assert_close(result, datum[i], rtol=0, atol=1e-5)


# ---------------------------------------------------------------- start levels, held tokens, branches of guidance


def timesteps_of(batch):
    """[L]: the timestep of each token."""
    return batch.timesteps_R[segment_ids(batch.cu_rows, len(batch.patches_LP))]


@SOLVERS
def test_sampling_starts_from_the_given_frames_at_their_level(solver):
    prompt, seen = make_prompt(3), []
    level_T = torch.tensor([0.0, 0.3, 0.6])
    prompt = dataclasses.replace(prompt, start_T=level_T)

    def model(batch):
        seen.append((timesteps_of(batch).view(3, 4), batch.patches_LP.view(3, 4, PATCH_DIM)))
        return torch.zeros_like(batch.patches_LP)

    sample = SampleConfig(num_inference_steps=10, solver=solver, guidance_scale=1.0)
    result = generate(one_by_one(model), [prompt], OBJECTIVE, sample)[0].view(3, 4, PATCH_DIM)
    given = prompt.record.patches_LP.view(3, 4, PATCH_DIM)
    start = torch.lerp(given, noise_of(3).view(3, 4, PATCH_DIM), level_T[:, None, None])
    torch.testing.assert_close(seen[0][1], start)
    first = seen[0][0][:, 0]
    torch.testing.assert_close(first, level_T)
    for t_TL, _ in seen:  # each frame keeps its level until the clip has reached it
        highest = t_TL[2, 0]
        torch.testing.assert_close(t_TL[:, 0], torch.minimum(level_T, highest))
    torch.testing.assert_close(result, start)  # a velocity of 0
    assert len(seen) == num_evaluations([prompt], OBJECTIVE, sample) < (19 if solver == "heun" else 10)


@SOLVERS
def test_a_sample_does_not_depend_on_prompts_with_other_start_levels(solver):
    prompts = [make_prompt(8), dataclasses.replace(make_prompt(1), start_T=torch.tensor([0.3]))]
    prompts += [dataclasses.replace(make_prompt(3), start_T=torch.tensor([0.0, 0.7, 0.7]))]
    sample, model = SampleConfig(num_inference_steps=7, solver=solver, guidance_scale=3.0), one_by_one(simple_model)
    together = generate(model, prompts, OBJECTIVE, sample)
    for prompt, expected in zip(prompts, together, strict=True):
        assert torch.equal(generate(model, [prompt], OBJECTIVE, sample)[0], expected)


def test_fewer_steps_from_a_lower_level():
    def steps(level):
        prompt = dataclasses.replace(make_prompt(1), start_T=torch.tensor([level]))
        return num_evaluations(
            [prompt], ObjectiveConfig(shift_tokens=1000), SampleConfig(num_inference_steps=20, solver="euler")
        )

    assert [steps(level) for level in (1.0, 0.5, 0.26, 0.01, 0.0)] == [20, 10, 6, 1, 0]


def test_a_clip_that_is_given_as_a_whole_comes_back_without_a_model_call():
    prompt = dataclasses.replace(make_prompt(3), start_T=torch.zeros(3))
    result = generate(one_by_one(lambda batch: pytest.fail("called")), [prompt], OBJECTIVE, SampleConfig())
    assert torch.equal(result[0], prompt.record.patches_LP)


@SOLVERS
def test_held_tokens_stay_on_the_path_to_their_given_value(solver):
    held = torch.tensor([True, False, True, True, False, True])
    prompt = dataclasses.replace(make_prompt(1), held_L=held)
    given, noise_LP = prompt.record.patches_LP, noise_of(1)

    def model(batch):
        t_L1 = timesteps_of(batch)[:, None]
        path = torch.lerp(given, noise_LP, t_L1)
        torch.testing.assert_close(batch.patches_LP[:6][held], path[held], rtol=1e-4, atol=1e-5)
        return torch.full_like(batch.patches_LP, 7.0)

    sample = SampleConfig(num_inference_steps=5, solver=solver, guidance_scale=1.0)
    result = generate(one_by_one(model), [prompt], OBJECTIVE, sample)[0]
    torch.testing.assert_close(result[held], given[held], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result[~held], noise_LP[~held] - 7, rtol=1e-4, atol=1e-4)


def test_the_branch_without_clean_frames_has_all_frames_at_one_timestep():
    batches = []

    def denoise(packs):
        batches.append(packs)
        return [torch.zeros_like(pack.patches_LP) for pack in packs]

    sample = SampleConfig(num_inference_steps=4, solver="euler", guidance_scale=3.0, context_guidance_scale=2.0)
    prompt = make_prompt(4)  # frame 0 and frames 3, 4 of 5 are clean
    generate(denoise, [prompt], OBJECTIVE, sample)
    for full, context, free in batches:
        assert not full.drop_text_G.any() and context.drop_text_G.all() and free.drop_text_G.all()
        assert torch.equal(full.timesteps_R, context.timesteps_R) and len(free.timesteps_R) == 1
        t = float(full.timesteps_R.max())
        assert full.timesteps_R.tolist() == [0, t, 0] and free.timesteps_R.tolist() == [t]
        assert torch.equal(full.patches_LP, context.patches_LP)
        noised = torch.lerp(prompt.record.patches_LP, noise_of(4), t)
        clean = torch.tensor([0, 1, 6, 7, 8, 9])
        torch.testing.assert_close(free.patches_LP[clean], noised[clean])
        assert torch.equal(free.patches_LP[2:6], full.patches_LP[2:6])


def test_windows_have_noise_of_their_own():
    record = make_prompt(3).record
    model = one_by_one(lambda b: torch.zeros_like(b.patches_LP))
    sample = SampleConfig(num_inference_steps=1, solver="euler")
    prompts = [dataclasses.replace(ClipPrompt.of_text(record), window=window) for window in (0, 1)]
    first, second = generate(model, prompts, OBJECTIVE, sample)
    assert not torch.isclose(first, second).any() and torch.equal(first, noise_of(3))


def test_a_negative_caption_replaces_the_null_token():
    negative = make_prompt(8).record.text_SE
    prompts = [dataclasses.replace(make_prompt(1), negative_SE=negative), make_prompt(3)]

    def denoise(packs):
        _, other = packs
        assert other.drop_text_G.tolist() == [False, True]
        assert torch.equal(other.text_SE[: len(negative)], negative)
        assert other.cu_text.tolist() == [0, len(negative), len(negative) + len(prompts[1].record.text_SE)]
        return [torch.zeros_like(pack.patches_LP) for pack in packs]

    generate(denoise, prompts, OBJECTIVE, SampleConfig(num_inference_steps=1))


def test_a_pack_may_be_longer_than_its_clips():
    sample = SampleConfig(num_inference_steps=3)
    prompts = [make_prompt(i) for i in (3, 1)]
    exact = generate(one_by_one(simple_model), prompts, OBJECTIVE, sample)
    padded = generate(one_by_one(simple_model), prompts, OBJECTIVE, sample, pad_tokens=lambda n: n + 13)
    assert all(torch.equal(a, b) for a, b in zip(exact, padded, strict=True))
