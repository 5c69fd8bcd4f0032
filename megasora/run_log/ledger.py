"""The ledger of a run: which clips each step was trained on, so that lost or repeated clips can be detected.

    RUN/ledger/rank-00003.jsonl    {"step": 7, "sample_ids": [...]}, one line per step, of this rank's packs

A line is written after its step. On resume, lines of steps after the checkpoint are removed. Ranks are those of the
launch: a launch with fewer ranks appends to fewer files and leaves the others as they are.
"""

from __future__ import annotations

import json
from pathlib import Path

from megasora.files import write_text_atomic
from megasora.jsonl import JsonlWriter

FOLDER = "ledger"


class Ledger:
    """Writer of one rank's file."""

    def __init__(self, run_dir: Path, rank: int):
        (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        self.writer = JsonlWriter(run_dir / FOLDER / f"rank-{rank:05d}.jsonl")

    def write(self, step: int, sample_ids: list[int]) -> None:
        """`step`: from 1. A clip that is split into several segments of the step appears once per segment."""
        self.writer.write({"step": step, "sample_ids": sample_ids})

    def close(self) -> None:
        self.writer.close()


def truncate_ledger(run_dir: Path, step: int) -> None:
    """Removes lines of steps after `step` and incomplete lines. Call it before any rank writes."""
    for file in ledger_files(run_dir):
        write_text_atomic(file, "".join(line for line in complete_lines(file) if json.loads(line)["step"] <= step))


def read_ledger(run_dir: Path) -> dict[int, list[int]]:
    """{step: sample ids of its clips on all ranks, sorted}."""
    sample_ids: dict[int, list[int]] = {}
    for file in ledger_files(run_dir):
        for line in map(json.loads, complete_lines(file)):
            sample_ids.setdefault(line["step"], []).extend(line["sample_ids"])
    return {step: sorted(sample_ids[step]) for step in sorted(sample_ids)}


def ledger_files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / FOLDER).glob("rank-*.jsonl"))


def complete_lines(file: Path) -> list[str]:
    """The lines of a file, without one that a killed process left incomplete."""
    return [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")]
