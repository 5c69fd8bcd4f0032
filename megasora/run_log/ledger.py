"""The ledger of a run: which clips each step was trained on, so that lost or repeated clips can be detected.

    RUN/ledger/rank-00003.jsonl    {"step": 7, "sample_ids": [...]}, one line per step, of this rank's packs
                                   {"step": 8, "sample_ids": [], "skipped": [...]}: a step that was not applied
                                   {"step": 9, "sample_ids": [], "skipped": [...], "rolled_back_to": 4}: nor 5 to 8

A line is written after its step. On resume, lines of steps after the checkpoint are removed. Ranks are those of the
launch: a launch with fewer ranks appends to fewer files and leaves the others as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megasora.errors import MegaSoraError, printable
from megasora.files import open_regular, write_text_atomic
from megasora.jsonl import JsonlWriter, parse_json
from megasora.run_log.skipped import FILE as SKIPPED_FILE

FOLDER = "ledger"


class Ledger:
    """Writer of one rank's file."""

    def __init__(self, run_dir: Path, rank: int):
        (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        self.writer = JsonlWriter(run_dir / FOLDER / f"rank-{rank:05d}.jsonl")

    def write(
        self, step: int, sample_ids: list[int], is_skipped: bool = False, rolled_back_to: int | None = None
    ) -> None:
        """`step`: from 1. A clip that is split into several segments of the step appears once per segment.

        `rolled_back_to`: the step whose weights the run has again after this one.
        """
        line: dict[str, Any] = {"step": step, "sample_ids": [] if is_skipped else sample_ids}
        if is_skipped:
            line["skipped"] = sample_ids
        if rolled_back_to is not None:
            line["rolled_back_to"] = rolled_back_to
        self.writer.write(line)

    def close(self) -> None:
        self.writer.close()


def truncate_ledger(run_dir: Path, step: int) -> None:
    """Removes lines of steps after `step` and incomplete lines, here and in skipped.jsonl. Call it before any rank
    writes."""
    for file in [*ledger_files(run_dir), *run_dir.glob(SKIPPED_FILE)]:
        write_text_atomic(file, "".join(text for text, line in complete_lines(file) if line["step"] <= step))


def read_ledger(run_dir: Path) -> dict[int, list[int]]:
    """{step: sample ids of the clips it was trained on, on all ranks, sorted}; [] for a step that was not applied, or
    that a rollback has undone."""
    return merge_lines(run_dir, is_skipped=False)


def read_skipped(run_dir: Path) -> dict[int, list[int]]:
    """{step: sample ids of its clips} of the steps that were not applied, or that a rollback has undone."""
    return merge_lines(run_dir, is_skipped=True)


def merge_lines(run_dir: Path, is_skipped: bool) -> dict[int, list[int]]:
    lines = [line for file in ledger_files(run_dir) for _, line in complete_lines(file)]
    undone = {step for line in lines for step in range(line.get("rolled_back_to", line["step"]) + 1, line["step"] + 1)}
    sample_ids: dict[int, list[int]] = {}
    for line in lines:
        is_line_skipped = "skipped" in line or line["step"] in undone
        if is_line_skipped or not is_skipped:
            clips = line["sample_ids"] + line.get("skipped", []) if is_line_skipped == is_skipped else []
            sample_ids.setdefault(line["step"], []).extend(clips)
    return {step: sorted(sample_ids[step]) for step in sorted(sample_ids)}


def ledger_files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / FOLDER).glob("rank-*.jsonl"))


def complete_lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a file as text and values, without a last one that a killed process left incomplete.

    Raises MegaSoraError with the number of a line that is damaged.
    """
    lines = []
    with open_regular(file) as opened:
        content = opened.read().decode("utf-8", errors="replace")
    for number, text in enumerate(content.splitlines(keepends=True), 1):
        if not text.endswith("\n"):
            break
        try:
            line = parse_json(text)
            if not (type(line["step"]) is int and isinstance(line["sample_ids"], list)):
                raise ValueError("step and sample_ids must be a number and a list")
        except (ValueError, KeyError, TypeError) as error:
            raise MegaSoraError(
                f"{file}, line {number} is damaged ({printable(str(error))}); restore the file, or move it away: the "
                "ledger then begins where the run resumes"
            ) from None
        lines.append((text, line))
    return lines
