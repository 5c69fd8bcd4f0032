"""The ledger of a run: which clips each step was trained on, to prove that none was lost or repeated.

    RUN/ledger/rank-00003.jsonl    {"step": 7, "sample_ids": [...]}, a line a step, of the packs that this rank has

Written after the step. Lines of steps after the checkpoint that a run goes on from are not of the run, and are removed.
Ranks are those of the launch: after one with fewer, the files of the others stay as they were.
"""

from __future__ import annotations

import json
from pathlib import Path

from megasora.files import write_whole
from megasora.observe.metrics import JsonLines

FOLDER = "ledger"


class Ledger:
    """One rank's file."""

    def __init__(self, run_dir: Path, rank: int):
        (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        self.lines = JsonLines(run_dir / FOLDER / f"rank-{rank:05d}.jsonl")

    def write(self, step: int, sample_ids: list[int]) -> None:
        """`step`: from 1. A clip of which a step has several parts is there as often."""
        self.lines.write({"step": step, "sample_ids": sample_ids})

    def close(self) -> None:
        self.lines.close()


def cut_ledger(run_dir: Path, step: int) -> None:
    """Removes what was written of steps after `step`, and lines that a kill has torn. Before the ranks write."""
    for file in files(run_dir):
        kept = [line for line in whole_lines(file) if json.loads(line)["step"] <= step]
        write_whole(file, "".join(kept))


def read_ledger(run_dir: Path) -> dict[int, list[int]]:
    """{step: sample ids of all its clips, sorted}."""
    found: dict[int, list[int]] = {}
    for file in files(run_dir):
        for line in map(json.loads, whole_lines(file)):
            found.setdefault(line["step"], []).extend(line["sample_ids"])
    return {step: sorted(found[step]) for step in sorted(found)}


def files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / FOLDER).glob("rank-*.jsonl"))


def whole_lines(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")]
