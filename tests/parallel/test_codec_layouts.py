"""Every layout of the context axis trains the codec that one process trains: outputs and every gradient, in float64."""

from contextlib import nullcontext
from functools import cache

import pytest
from codec_layouts import CASES, LAYOUTS, largest_error, one_process, random_case, train_all
from hypothesis import given, settings
from hypothesis import strategies as st

from megasora.config import Config, DataConfig, ParallelConfig, load
from megasora.errors import MegaSoraError
from megasora.parallel.layout import check_codec_layout, check_layout
from megasora.testing.spawn import run_ranks

FLOAT64 = 1e-10
RANDOM = {f"random {seed}": random_case(seed) for seed in range(4)}
RUNS = [((2, 2), name) for name in [*CASES, *RANDOM]] + [
    (layout, name) for layout in LAYOUTS for name in LAYOUTS[layout]
]


@cache
def results_of(processes):
    """Of all ranks; an error is returned, so that it is cached too."""
    runs = [(layout, name) for layout, name in RUNS if layout[0] * layout[1] == processes]
    try:
        return run_ranks(train_all, processes, CASES | RANDOM, runs)
    except (RuntimeError, TimeoutError) as error:
        return error


@cache
def expected(name):
    return one_process((CASES | RANDOM)[name])


@pytest.mark.slow
@pytest.mark.parametrize("layout, name", RUNS, ids=str)
def test_a_layout_computes_the_same_outputs_and_gradients(layout, name):
    results = results_of(layout[0] * layout[1])
    if isinstance(results, Exception):
        raise results
    for rank in results:
        error, worst = largest_error(rank[layout, name], expected(name))
        assert error <= FLOAT64, f"{worst} has error {error:.1e}"


# ---------------------------------------------------------------------- invalid layouts

INVALID = {  # (processes, overrides, part of the message)
    "matrices": (2, "parallel.tensor=2", "parallel.tensor=2 divides the matrices of a DiT and is not for"),
    "stages": (2, "parallel.pipeline=2", "parallel.pipeline=2 divides the blocks of a DiT and is not for"),
    "heads": (2, "parallel.context=2 parallel.ulysses=2", "parallel.ulysses=2 divides the heads of a DiT"),
    "symmetric memory": (
        2, "parallel.context=2 parallel.symmetric_memory=true", "symmetric_memory=true is for the matrices of a DiT",
    ),
    "rows over context": (
        6, "parallel.context=6 parallel.rows=4", "parallel.rows=4 must divide parallel.context=6; use 1, 2, 3 or 6"
    ),
    "no rows": (1, "parallel.rows=0", "parallel.rows"),
    "processes": (6, "parallel.context=4 parallel.rows=2", "= 4 must divide the 6 processes; start 4 or 8 processes"),
    "packs": (6, "parallel.context=2", "data.packs_per_step=8 must be a multiple of the 3 data-parallel ranks"),
    "frames of a crop": (
        8, "parallel.context=8 parallel.rows=2 data.crop=[9,64,64]",
        "makes clips of 3 latent frames, fewer than the parallel.context=8 / parallel.rows=2 = 4 ranks that would "
        "share them; use at least 10 frames",
    ),
    "rows of a crop": (
        4, "parallel.context=4 parallel.rows=4 data.crop=[9,24,64]",
        "makes clips of 3 latent rows, fewer than the parallel.rows=4 ranks that would share them; use at least "
        "25 rows",
    ),
}  # fmt: skip
CODEC = ["codec.name=vae", "codec.channels=16"]  # 4 x 8 x 8


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_layout_raises_an_error_with_the_numbers_and_a_remedy(case):
    processes, overrides, expected = INVALID[case]
    with pytest.raises(MegaSoraError) as caught:
        check_codec_layout(load(None, [*CODEC, *overrides.split()]), processes)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_rows_are_not_for_a_dit():
    with pytest.raises(MegaSoraError, match=r"parallel\.rows=2 divides the frames of a codec"):
        check_layout(load(None, ["parallel.context=2", "parallel.rows=2"]), 2)


SIZE = st.sampled_from([1, 1, 2, 3, 4])


@settings(deadline=None, max_examples=200)
@given(data=SIZE, extra=st.sampled_from([0, 0, 1]), context=SIZE, rows=SIZE, frames=st.integers(0, 14), height=SIZE)
def test_a_layout_is_accepted_exactly_if_a_crop_can_be_divided(data, extra, context, rows, frames, height):
    config = Config()  # 4 x 8 x 8
    config.parallel = ParallelConfig(context=context, rows=rows)
    config.data = DataConfig(crop=[frames, 8 * height, 0], packs_per_step=12)
    latent_frames = len(range(0, frames - 1, 4)) + 1  # of the padded crop
    valid = (
        (context * data + extra) % context == 0
        and 12 % ((context * data + extra) // context) == 0
        and context % rows == 0
        and (not frames or latent_frames >= context // rows)
        and height >= rows
    )
    with nullcontext() if valid else pytest.raises(MegaSoraError):
        check_codec_layout(config, context * data + extra)
