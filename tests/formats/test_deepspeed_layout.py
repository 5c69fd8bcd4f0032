"""Where ZeRO puts the elements of parameters, compared with the concatenation, padding and cutting that define it."""

import itertools
import random

import pytest
import torch

from megasora.formats.deepspeed_layout import partition_groups, partition_parameters, split_sub_groups

CASES = range(60)


def random_groups(seed):
    """One to three groups of parameters of 1 to 40 elements, and a number of ranks."""
    draw = random.Random(seed)
    names = (f"p{i}" for i in itertools.count())
    groups = [
        {next(names): torch.Size((draw.randint(1, 8), draw.randint(1, 5))) for _ in range(draw.randint(1, 6))}
        for _ in range(draw.randint(1, 3))
    ]
    return groups, draw.choice([1, 2, 3, 4, 7, 16])


def values_of(groups):
    """A different number for each element of each parameter."""
    count = itertools.count(1)
    return {
        name: torch.tensor([next(count) for _ in range(shape.numel())]) for g in groups for name, shape in g.items()
    }


def place(layout, values):
    """The flat tensors by rank and group, made from the pieces; asserts that no element is written twice."""
    flat = [[torch.zeros(size, dtype=torch.long) for size in layout.partition_sizes] for _ in range(layout.processes)]
    for name, pieces in layout.pieces.items():
        for p in pieces:
            target = flat[p.rank][p.group][p.offset : p.offset + p.count]
            assert target.shape == (p.count,) and p.count > 0 and not target.any()
            target.copy_(values[name][p.start : p.start + p.count])
    return flat


def check_complete(layout, groups):
    for name, shape in itertools.chain.from_iterable(group.items() for group in groups):
        ends = [0, *itertools.accumulate(piece.count for piece in layout.pieces[name])]
        assert [piece.start for piece in layout.pieces[name]] == ends[:-1] and ends[-1] == shape.numel()


@pytest.mark.parametrize("seed", CASES)
def test_stages_1_and_2_cut_the_padded_concatenation_of_a_group(seed):
    groups, processes = random_groups(seed)
    values, layout = values_of(groups), partition_groups(groups, processes)
    check_complete(layout, groups)
    flat = place(layout, values)
    for index, group in enumerate(groups):
        whole = torch.cat([values[name] for name in group])
        padded = torch.cat([whole, torch.zeros(-len(whole) % (2 * processes), dtype=torch.long)])
        parts = padded.chunk(processes)
        assert all(torch.equal(flat[rank][index], part) for rank, part in enumerate(parts))
        used = [int((part != 0).sum()) for part in parts]
        assert used == [layout.used[rank][index] for rank in range(processes)]


@pytest.mark.parametrize("seed", CASES)
def test_aligned_parameters_of_stages_1_and_2_have_padding_between_them(seed):
    groups, processes = random_groups(seed)
    paddings = []
    for group in groups:  # as zero_optimization.parameter_alignment: each starts at a multiple of 4
        lengths = [shape.numel() for shape in group.values()]
        paddings.append([-length % 4 for length in lengths[:-1]] + [0])
    values, layout = values_of(groups), partition_groups(groups, processes, paddings)
    check_complete(layout, groups)
    for index, group in enumerate(groups):
        flat = torch.cat([place(layout, values)[rank][index] for rank in range(processes)])
        start = 0
        for name, padding in zip(group, paddings[index], strict=True):
            assert start % 4 == 0 and torch.equal(flat[start : start + len(values[name])], values[name])
            start += len(values[name]) + padding
        assert not flat[start:].any() and len(flat) - start < 2 * processes


@pytest.mark.parametrize("seed", CASES)
def test_stage_3_cuts_each_padded_parameter(seed):
    groups, processes = random_groups(seed)
    values, layout = values_of(groups), partition_parameters(groups, processes)
    check_complete(layout, groups)
    flat = place(layout, values)
    for index, group in enumerate(groups):
        parts = [[] for _ in range(processes)]
        for name in group:
            padding = torch.zeros(-len(values[name]) % processes, dtype=torch.long)
            for rank, part in enumerate(torch.cat([values[name], padding]).chunk(processes)):
                parts[rank].append(part)
        assert all(torch.equal(flat[rank][index], torch.cat(parts[rank])) for rank in range(processes))


@pytest.mark.parametrize("seed", CASES)
def test_a_sub_group_ends_when_it_is_large_enough(seed):
    groups, processes = random_groups(seed)
    size = random.Random(-seed).randint(1, 40)
    divided = split_sub_groups(groups, processes, size)
    for group, parts in zip(groups, divided, strict=True):
        assert [name for part in parts for name in part] == list(group)
        lengths = [[-(-shape.numel() // processes) for shape in part.values()] for part in parts]
        assert all(sum(part) >= size for part in lengths[:-1])
        assert all(sum(part[:-1]) < size for part in lengths)


def test_pieces_of_a_rank_are_by_group_and_name():
    groups = [{"a": torch.Size((3,)), "b": torch.Size((2, 2))}, {"c": torch.Size((1,))}]
    layout = partition_groups(groups, 2)  # a and b: 7 elements in 2 x 4
    first, second = layout.by_rank
    assert {name: (p.offset, p.start, p.count) for name, p in first[0].items()} == {"a": (0, 0, 3), "b": (3, 0, 1)}
    assert {name: (p.offset, p.start, p.count) for name, p in second[0].items()} == {"b": (0, 1, 3)}
    assert set(first[1]) == {"c"} and not second[1]
    assert layout.used == [[4, 1], [3, 0]] and layout.partition_sizes == [4, 2]
