"""Clips are divided into pieces of whole latents, and stacks of short clips into whole clips; every value is in one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megasora.parallel.clip_split import even_ranges, split_stacks

SIZE = st.integers(1, 9)
STACKS = st.lists(st.tuples(st.integers(1, 9), SIZE, SIZE, st.integers(1, 3)), min_size=1, max_size=5)


def sizes_of(stacks, factors):
    return [(b, 1 + (t - 1) * factors[0], h * factors[1], w * factors[2]) for b, t, h, w in stacks]


@settings(deadline=None, max_examples=200)
@given(stacks=STACKS, time=st.integers(1, 4), rows=st.integers(1, 3), factors=st.sampled_from([(1, 4, 4), (4, 8, 8)]))
def test_every_pixel_and_latent_is_in_one_piece(stacks, time, rows, factors):
    for (b, t, h, w), split in zip(stacks, split_stacks(sizes_of(stacks, factors), factors, time, rows), strict=True):
        assert split.is_split == (t >= time and h >= rows) and len(split.pieces) == time * rows
        pieces = [piece for piece in split.pieces if piece is not None]
        assert len(pieces) == time * rows or not split.is_split
        for grid, unit in (((b, 2, t, h, w), (1, 1, 1)), (sizes_of([(b, t, h, w)], factors)[0], factors)):
            counts = torch.zeros(grid if len(grid) == 5 else (grid[0], 2, *grid[1:]))
            for piece in pieces:
                part = piece.take(counts, unit)
                part += 1
                starts = 1 if piece.frames[0] == 0 else 0
                assert part.shape[2] % unit[0] == starts % unit[0] and part.shape[3] % unit[1] == 0
            assert bool((counts == 1).all())


@settings(deadline=None, max_examples=200)
@given(total=st.integers(0, 100), parts=st.integers(1, 12))
def test_ranges_are_consecutive_and_equal_within_one(total, parts):
    ranges = even_ranges(total, parts)
    assert [start for start, _ in ranges] + [total] == [0] + [stop for _, stop in ranges]
    lengths = [stop - start for start, stop in ranges]
    assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)


@settings(deadline=None, max_examples=100)
@given(clips=st.lists(st.integers(1, 12), min_size=1, max_size=5), ranks=st.integers(2, 5))
def test_images_of_one_size_are_divided_evenly_however_they_are_stacked(clips, ranks):
    splits = split_stacks([(count, 1, 8, 8) for count in clips], (4, 8, 8), ranks, 1)
    per_rank = [
        sum(s.pieces[rank].clips[1] - s.pieces[rank].clips[0] for s in splits if s.pieces[rank])
        for rank in range(ranks)
    ]
    assert sum(per_rank) == sum(clips) and max(per_rank) - min(per_rank) <= 1


def test_pieces_of_a_known_clip():
    (split,) = split_stacks([(2, 17, 24, 16)], (4, 8, 8), 2, 2)  # 5 latent frames, 3 latent rows
    assert [(p.clips, p.frames, p.rows) for p in split.pieces] == [
        ((0, 2), (0, 3), (0, 2)), ((0, 2), (0, 3), (2, 3)), ((0, 2), (3, 5), (0, 2)), ((0, 2), (3, 5), (2, 3)),
    ]  # fmt: skip
    frames = torch.arange(17).view(1, 1, 17, 1, 1).expand(2, 3, 17, 24, 16)
    assert split.pieces[2].take(frames, (4, 8, 8))[0, 0, :, 0, 0].tolist() == [*range(9, 17)]


@pytest.mark.parametrize("size", [(1, 4, 8, 8), (1, 5, 9, 8), (1, 5, 8, 12)])
def test_a_clip_without_whole_latents_is_an_error(size):
    with pytest.raises(ValueError, match="no whole number of latents"):
        split_stacks([size], (4, 8, 8), 1, 1)
