"""Mutation tests: the comparison of test_codec_layouts fails, far above its bound, if a fault is injected."""

import math
from contextlib import nullcontext
from functools import cache
from unittest.mock import patch

import codec_layouts
import pytest
from codec_layouts import Case, largest_error, many_processes, one_process

from megasora.parallel import clip_split, halo
from megasora.parallel.clip_exchange import RowsToFrames
from megasora.parallel.clip_split import LATENTS, Piece, StackSplit
from megasora.parallel.halo import ROWS, HaloBoundary, Side
from megasora.testing.spawn import run_ranks

FLOAT64, LEAST_ERROR = 1e-10, 1e-3
CASE = Case(2, ((1, 4, 2, 1), (2, 1, 1, 1)))  # a clip that is split over four ranks, one latent frame each, and images


def halos_without_corners(self, x, sides, original=HaloBoundary.start_halos):
    if sides[0].dim == ROWS and not self.starts_clip:
        x = x.clone()
        x[:, :, :2] = 0  # the frames received from the preceding rank
    return original(self, x, sides)


def sent_without_own_halo(self, x, halo, original=Side.sent):
    return original(self, x, None)


def add_without_own_halo(self, returned, grad, halo_grad, original=Side.add_returned):
    original(self, returned, grad, None)


def add_twice(self, returned, grad, halo_grad, original=Side.add_returned):
    original(self, returned, grad, halo_grad)
    original(self, returned, grad, halo_grad)


def rows_above_and_below_swapped(self, border):
    return [Side(self.rows, ROWS, border, step) for step in (1, -1)][::-1] if self.rows.is_split else []


def gradient_of_own_frames(ctx, grad, original=RowsToFrames.backward):
    return original(ctx, grad * (ctx.axis.rank == 0))


def whole_clips_on_every_rank(size, factors, load, original=clip_split.divide_stack):
    frames, height = clip_split.latent_size(size, factors)
    return StackSplit((Piece((0, size[0]), (0, frames), (0, height)),) * len(load), False)


def latents_from_the_first(self, x, factors=LATENTS, original=Piece.take):
    if factors != LATENTS:
        return original(self, x, factors)
    (start, stop), rows = self.frames, slice(*self.rows)
    return x[slice(*self.clips), :, : stop - start, rows]


def every_piece_starts_its_clip(self, time, rows, original=HaloBoundary.__init__):
    original(self, time, rows)
    self.starts_clip = True


def no_piece_starts_its_clip(self, time, rows, original=HaloBoundary.__init__):
    original(self, time, rows)
    self.starts_clip = False


FAULTS = {  # (layout, fault): patch
    ((2, 2), "the gradient of a halo is dropped"): patch.object(HaloBoundary, "return_halos", lambda *_: None),
    ((2, 2), "the gradient of a halo is added twice"): patch.object(Side, "add_returned", add_twice),
    ((2, 2), "corners are zeros"): patch.object(HaloBoundary, "start_halos", halos_without_corners),
    ((2, 2), "rows above and below are swapped"): patch.object(
        HaloBoundary, "rows_sides", rows_above_and_below_swapped
    ),
    ((2, 2), "the loss returns a part of the gradient"): patch.object(
        RowsToFrames, "backward", staticmethod(gradient_of_own_frames)
    ),
    ((2, 2), "whole clips count once per rank"): patch.object(clip_split, "divide_stack", whole_clips_on_every_rank),
    ((2, 2), "noise from the first position"): patch.object(Piece, "take", latents_from_the_first),
    ((4, 1), "a short piece passes no frames on"): patch.object(Side, "sent", sent_without_own_halo),
    ((4, 1), "a short piece passes no gradient on"): patch.object(Side, "add_returned", add_without_own_halo),
    ((4, 1), "halos are not copied"): patch.object(halo, "copy_arrived", lambda arriving, _: arriving[1].wait()),
}
STARTS = {"every piece starts its clip": every_piece_starts_its_clip, "no piece does": no_piece_starts_its_clip}


def train_with_each_fault():
    """{(layout, fault): result} of one rank. All ranks have the fault."""
    meshes, results = {layout: codec_layouts.codec_mesh(*layout) for layout in ((2, 2), (4, 1))}, {}
    for (layout, fault), mutation in ({(layout, "none"): None for layout in meshes} | FAULTS).items():
        with mutation or nullcontext():
            results[layout, fault] = many_processes(CASE, meshes[layout])
    return results


def train_with_wrong_start(init):
    HaloBoundary.__init__ = init
    return many_processes(CASE, codec_layouts.codec_mesh(2, 1))


@cache
def results():
    return run_ranks(train_with_each_fault, 4)


@cache
def expected():
    return one_process(CASE)


def error_of(case):
    return max(largest_error(rank[case], expected())[0] for rank in results())


@pytest.mark.parametrize("layout", [(2, 2), (4, 1)], ids=str)
def test_the_comparison_passes_without_a_fault(layout):
    assert error_of((layout, "none")) <= FLOAT64


@pytest.mark.parametrize("case", FAULTS, ids=str)
def test_the_comparison_fails_with_a_fault(case):
    assert LEAST_ERROR < error_of(case) < math.inf


@pytest.mark.parametrize("fault", STARTS)
def test_a_piece_that_wrongly_starts_its_clip_or_does_not_cannot_be_computed(fault):
    with pytest.raises(RuntimeError, match="shape|size"):
        run_ranks(train_with_wrong_start, 2, STARTS[fault])
