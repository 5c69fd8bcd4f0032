"""Parts of an ingest: from text and from the environment, and the blocks that each writes."""

from __future__ import annotations

import pytest

from megasora.errors import MegaSoraError
from megasora.ingest.parts import Part

ENVIRONMENTS = [
    ({}, (0, 1)),
    ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
    ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5"}, (2, 4)),
    ({"SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_STEP": "4"}, (2, 3)),
    ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "RANK": "2", "WORLD_SIZE": "4"}, (6, 8)),
]


@pytest.mark.parametrize(("variables", "expected"), ENVIRONMENTS)
def test_the_part_of_a_process_follows_from_the_variables_of_torchrun_and_slurm(variables, expected):
    assert Part.from_environment(variables) == Part(*expected)


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "8", "WORLD_SIZE": "8"},
        {"RANK": "x"},
        {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "2"},  # an array with gaps
    ],
)
def test_environment_variables_out_of_range_are_an_error(variables):
    with pytest.raises(MegaSoraError, match="--part"):
        Part.from_environment(variables)


def test_parts_are_numbered_from_1_to_n_and_cover_every_block_once():
    assert Part.parse("1/8") == Part(0, 8) and Part.parse("8/8") == Part(7, 8)
    for wrong in ("0/8", "9/8", "1", "1/", "a/b", "-1/2", "1/0"):
        with pytest.raises(MegaSoraError, match=f"--part {wrong} is not I/N"):
            Part.parse(wrong)
    for parts in (1, 2, 5, 30):
        blocks = [block for index in range(parts) for block in Part(index, parts).blocks(23)]
        assert sorted(blocks) == list(range(23))
