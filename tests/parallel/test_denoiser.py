"""Every layout computes the velocities and samples of one process, on every rank that shares a pack."""

from dataclasses import replace
from functools import cache

import layouts
import pytest
import torch
import torch.distributed as dist
from layouts import PATCH_DIM, RandomWeights, configure, random_weight

from megasora.build import build_model
from megasora.config import SampleConfig
from megasora.data.pack import Record
from megasora.parallel.mesh import build_mesh
from megasora.parallelize import build_denoiser
from megasora.sampling.generate import ClipPrompt, generate
from megasora.testing.spawn import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
VELOCITY, SAMPLE = 1e-5, 1e-4  # largest relative errors
PROCESSES = 4
LAYOUTS = [
    layouts.layout(PROCESSES, tensor=2, context=2),
    layouts.layout(PROCESSES, context=4, ulysses=2),
    layouts.layout(PROCESSES, tensor=2, pipeline=2),
    layouts.layout(PROCESSES, pipeline=2, schedule="zbv"),  # on two data ranks, each with prompts of its own
    layouts.layout(PROCESSES, context=2, pipeline=2, schedule="interleaved", stages_per_rank=2),
]
SETTINGS = SampleConfig(
    solver="euler", num_inference_steps=2, guidance_scale=3.0, context_guidance_scale=1.5,
    unconditional="negative_prompt",
)  # fmt: skip


def prompt(sample_id: int, grid: tuple[int, int, int], levels: list[float], held: bool = False) -> ClipPrompt:
    draw = torch.Generator().manual_seed(sample_id)
    t, h, w = grid
    patches = torch.randn(t * h * w, PATCH_DIM, generator=draw)
    text, negative = (torch.randint(0, 257, (n, 16), generator=draw) for n in (1 + sample_id, 2))
    record = Record(sample_id, patches, grid, text, (8.0 * h, 8.0 * w, 4.0 * t - 3, 8.0), "x")
    held_L = torch.arange(t * h * w) % 3 == 0 if held else None
    return ClipPrompt(record, torch.tensor(levels), held_L, negative if sample_id % 2 else None, seed=4)


PROMPTS = [
    prompt(0, (3, 4, 5), [1.0, 1.0, 1.0]),  # text
    prompt(1, (4, 2, 3), [0.0, 1.0, 1.0, 0.0]),  # first and last frame
    prompt(2, (2, 3, 3), [0.6, 0.6], held=True),  # an edit with a mask
    prompt(3, (1, 1, 1), [1.0]),  # fewer tokens than ranks
]


def prompts_of(data_rank: int) -> list[ClipPrompt]:
    """Those of the first data rank, or others in another order."""
    return PROMPTS if data_rank == 0 else [replace(p, seed=9) for p in reversed(PROMPTS)]


def run_generate(denoise, config, data_rank: int, **options) -> list[torch.Tensor]:
    """The samples of all prompts in one pack, then of the last one in a pack of its own."""
    prompts = prompts_of(data_rank)
    calls = [generate(denoise, some, config.objective, SETTINGS, **options) for some in (prompts, prompts[-1:])]
    return [*calls[0], *calls[1]]


@cache
def single_process(data_rank: int) -> tuple[list, list[torch.Tensor], list[torch.Tensor]]:
    """(all noised packs of `generate`, their velocities, the samples)."""
    config = configure(layouts.layout(1), "shared")
    model = build_model(config, PATCH_DIM)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_weight(name, parameter.shape))
    packs, velocities = [], []

    def denoise(batches):
        packs.extend(batches)
        velocities.extend(model(batch) for batch in batches)
        return velocities[-len(batches) :]

    samples = run_generate(denoise, config, data_rank)
    return packs, velocities, samples


def sample_on_ranks(layout_names: list[str], packs_by_data_rank: list) -> list[tuple]:
    """Of each layout: (data rank, velocities of the packs of one process, samples)."""
    results = []
    for layout in (layout for layout in LAYOUTS if layout.name in layout_names):
        config = configure(layout, "shared")
        mesh = build_mesh(config.parallel, "cpu")
        denoise = build_denoiser(config, torch.device("cpu"), mesh, RandomWeights())
        velocities = denoise(packs_by_data_rank[mesh.data.rank])
        samples = run_generate(denoise, config, mesh.data.rank, pad_tokens=denoise.pad_tokens)
        results.append((mesh.data.rank, velocities, samples))
        dist.barrier()
    return results


@pytest.fixture(scope="module")
def results():
    """{layout: results of its ranks}, of one start of the processes."""
    names = [layout.name for layout in LAYOUTS]
    by_rank = run_ranks(sample_on_ranks, PROCESSES, names, [single_process(rank)[0] for rank in range(2)])
    return {name: [result[i] for result in by_rank] for i, name in enumerate(names)}


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    assert value.dtype == torch.float32 and value.shape == expected.shape
    return float((value - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_velocities_on_every_rank_are_those_of_one_process(results, layout):
    for data_rank, velocities, _ in results[layout.name]:
        packs, expected, _ = single_process(data_rank)
        assert len(velocities) == len(expected) == len(packs)
        for pack, v_LP, expected_LP in zip(packs, velocities, expected, strict=True):
            tokens = pack.num_tokens
            assert error(v_LP[:tokens], expected_LP[:tokens]) <= VELOCITY
            assert not v_LP[tokens:].any()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_samples_on_every_rank_are_those_of_one_process(results, layout):
    for data_rank, _, samples in results[layout.name]:
        for sample, expected in zip(samples, single_process(data_rank)[2], strict=True):
            assert error(sample, expected) <= SAMPLE


def test_the_packs_of_the_comparison_have_rows_of_every_kind():
    timesteps = {len({round(float(t), 3) for t in pack.timesteps_R}) for pack in single_process(0)[0]}
    assert max(timesteps) >= 3  # clean, partly clean and free rows in one pack
    assert any(len(pack.cu_rows) > len(pack.cu_segments) for pack in single_process(0)[0])
    assert any(pack.num_tokens < PROCESSES for pack in single_process(0)[0])
