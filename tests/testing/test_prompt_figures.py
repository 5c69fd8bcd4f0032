"""Measures of sampled clips have known values on rendered ones."""

import dataclasses
import math

import numpy as np
import pytest

from megasora.testing.clips import SPEEDS, clip_at, positions, render
from megasora.testing.detector import detect
from megasora.testing.prompt_figures import (
    Figure,
    largest_jump,
    mean,
    median,
    path_correlation,
    path_error,
    psnr,
    ratio,
    share,
    step_lengths,
    table,
    torus_offset,
)

CANVAS = (24, 32)  # width, height


def line(start, step, frames=9):
    return (np.array(start, float) + np.arange(frames)[:, None] * np.array(step)) % np.array(CANVAS)


def test_distances_take_the_shortest_way_around_the_torus():
    a, b = np.array([[1.0, 31.0]]), np.array([[23.0, 2.0]])
    assert torus_offset(a, b, CANVAS).tolist() == [[2.0, -3.0]]
    assert path_error(a, b, CANVAS) == pytest.approx(math.sqrt(13))
    assert path_error(a + np.array(CANVAS), b, CANVAS) == pytest.approx(math.sqrt(13))


def test_a_missing_shape_is_the_largest_error_and_an_infinite_jump():
    path = line((3, 4), (2, 0))
    broken = path.copy()
    broken[4] = np.nan
    error = path_error(broken, path, CANVAS)
    assert error[4] == math.hypot(12, 16) and error.sum() == error[4]
    assert largest_jump(broken, CANVAS) == math.inf and path_correlation(broken, path, CANVAS) == 0


def test_uniform_motion_has_no_jump_and_a_skipped_frame_doubles_a_step():
    path = line((20, 4), (3, 0), 12)
    assert step_lengths(path, CANVAS) == pytest.approx(3)
    assert largest_jump(path, CANVAS) == pytest.approx(1)
    assert largest_jump(np.delete(path, 5, 0), CANVAS) == pytest.approx(2)


def test_correlation_of_paths_says_whether_the_motion_is_the_same():
    right, left, down = line((20, 4), (2, 0)), line((20, 4), (-2, 0)), line((20, 4), (0, 2))
    assert path_correlation(right, line((3, 9), (3, 0)), CANVAS) == pytest.approx(1)
    assert path_correlation(right, left, CANVAS) == pytest.approx(-1)
    assert path_correlation(right, down, CANVAS) == pytest.approx(0)
    assert path_correlation(right, line((20, 4), (0, 0)), CANVAS) == 0


def test_measures_of_a_rendered_clip_are_those_of_its_recipe():
    spec, _ = clip_at(5, "val", 1, native_sizes={(32, 24): 1.0}, lengths={9: 1.0})
    path = detect(render(spec)).positions
    assert path_error(path, positions(spec), CANVAS).max() < 0.5
    assert np.median(step_lengths(path, CANVAS)) == pytest.approx(SPEEDS[spec.speed], abs=0.3)
    assert psnr(render(spec), render(spec)) == 99
    brighter = dataclasses.replace(spec, brightness=spec.brightness + 1)
    assert 48 < psnr(render(spec), render(brighter)) < 49  # an error of 1 grey level, 48.13 dB, where there is no shape


def test_figures_have_the_standard_errors_of_their_kind():
    assert (share("a", [True] * 3 + [False]).value, share("a", [True] * 3 + [False]).error) == (0.75, 0.75**0.5 / 4)
    values = np.random.default_rng(0).normal(5, 2, 400)
    assert mean("b", values).error == pytest.approx(0.1, rel=0.1)
    assert median("c", values).error == pytest.approx(0.125, rel=0.3)  # 1.25 times that of the mean
    below = np.full(400, 10.0)
    assert ratio("d", values, below).value == pytest.approx(0.5, rel=0.05)
    assert ratio("d", values, below).error == pytest.approx(mean("b", values).error / 10, rel=0.02)


def test_a_figure_says_whether_it_is_as_asked():
    cases = [((">=", 0.5), 0.5, True), ((">=", 0.5), 0.4, False), (("<=", 3), 4.0, False), (None, 1.0, None)]
    for target, value, met in cases:
        assert Figure("x", value, 0.1, 4, target=target).is_met is met
    text = table([Figure("accuracy", 0.4, 0.1, 4, target=(">=", 0.5)), Figure("drift", 1.234, 0.1, 4, "px")])
    assert "| accuracy | 0.4 ± 0.1 | 4 | >= 0.5 | **no** |" in text and "| drift | 1.23 ± 0.1 px | 4 |  |  |" in text
    assert Figure("x", 0.4, 0.1, 4, target=(">=", 0.5)).row()["target"] == ">= 0.5"
