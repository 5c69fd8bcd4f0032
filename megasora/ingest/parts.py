"""Division of an ingest into parts, one per process.

Block b is the clips [b n, (b + 1) n) of the listing, n = `ingest.clips_per_block`. Part i of p writes every p-th
block, from block i on. Each block is written by one process, so the shards do not depend on the number of processes,
and processes need not communicate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megasora.errors import MegaSoraError, printable


@dataclass(frozen=True)
class Part:
    """One of `count` parts of an ingest; `index` counts from 0, texts from 1."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Part:
        """Parses `1/8` to `8/8`. Raises MegaSoraError."""
        numbers = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
        if not (numbers and 1 <= int(numbers[1]) <= int(numbers[2])):
            raise MegaSoraError(f"--part {printable(text, 60)} is not I/N with I from 1 to N, e.g. 1/8")
        return cls(int(numbers[1]) - 1, int(numbers[2]))

    @classmethod
    def from_environment(cls, variables: Mapping[str, str]) -> Part:
        """The part given by torchrun's and Slurm's variables: ranks, tasks of a job array, or ranks within each task.

        Raises MegaSoraError where a variable is not a number or out of range.
        """

        def number(name: str, default: int) -> int:
            text = variables.get(name, str(default))
            if not re.fullmatch("[0-9]{1,9}", text):
                raise MegaSoraError(f"{name}={printable(text, 60)} is not a number; unset it, or give --part")
            return int(text)

        rank, ranks = number("RANK", 0), number("WORLD_SIZE", 1)
        first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1)
        task = (number("SLURM_ARRAY_TASK_ID", first) - first) // max(1, step)
        tasks = number("SLURM_ARRAY_TASK_COUNT", 1)
        if not (0 <= rank < ranks and 0 <= task < tasks):
            raise MegaSoraError(
                f"RANK={rank} of WORLD_SIZE={ranks}, task {task} of SLURM_ARRAY_TASK_COUNT={tasks}: no such process; "
                "number the tasks of the array without gaps, or give --part"
            )
        return cls(task * ranks + rank, tasks * ranks)

    def blocks(self, num_blocks: int) -> range:
        """Indices of the blocks that this part writes."""
        return range(self.index, num_blocks, self.count)
