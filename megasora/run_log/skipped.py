"""Steps of a run that were not applied: RUN/skipped.jsonl, one line each, from the main process.

    {"step": 7, "reason": "non-finite", "loss": null, "grad_norm": null, "non_finite_clips": [12], "sample_ids": [...]}

`reason`: no clips | non-finite | spike (megasora/optim/step_guard.py). `sample_ids`: all clips of the step;
`non_finite_clips`: those whose loss is not finite. With `rolled_back_to`, the steps from the one after it to this one
have no effect on the weights either. On resume, lines of steps after the checkpoint are removed, as in the ledger.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megasora.jsonl import JsonlWriter, finite_or_none
from megasora.optim.step_guard import NO_CLIPS, NON_FINITE, Verdict, describe_clips
from megasora.parallel.world import World

FILE = "skipped.jsonl"


def gather_skipped_step(
    world: World, step: int, verdict: Verdict, loss: float | None, grad_norm: float | None, clips: list[int],
    non_finite_clips: list[int],
) -> dict[str, Any]:  # fmt: skip
    """The line of a step, on all ranks; all must call it. `clips`, `non_finite_clips`: the sample ids of this rank."""
    by_rank = world.gather_objects((clips, non_finite_clips)) or []
    all_clips = sorted(i for rank_clips, _ in by_rank for i in rank_clips)
    distinct = sorted({i for _, rank_clips in by_rank for i in rank_clips})  # ranks may share packs
    clips, non_finite_clips = world.broadcast_object((all_clips, distinct))
    figures = {"loss": finite_or_none(loss), "grad_norm": finite_or_none(grad_norm)}
    ids = {"non_finite_clips": non_finite_clips, "sample_ids": clips}
    return {"step": step, "reason": verdict.reason, **figures, **ids}


def skipped_columns(line: dict[str, Any] | None) -> dict[str, Any]:
    """What metrics.jsonl has of it; {} for a step that was applied."""
    if line is None:
        return {}
    return {"skipped": line["reason"], **{key: line[key] for key in ("rolled_back_to",) if key in line}}


def log_skipped_step(run_dir: Path, line: dict[str, Any]) -> None:
    writer = JsonlWriter(run_dir / FILE)
    writer.write(line)
    writer.close()


def describe_skipped_step(line: dict[str, Any]) -> str:
    """A line for the screen."""
    step, reason, clips = line["step"], line["reason"], line["non_finite_clips"]
    if reason == NO_CLIPS:
        return f"step {step}: skipped, none of its clips could be read; see damaged.jsonl"
    if reason == NON_FINITE:
        what = "the loss" if line["loss"] is None else "the gradient norm"
        return f"step {step}: skipped, {what} is not finite" + (f", in {describe_clips(clips)}" if clips else "")
    text = f"step {step}: skipped, its loss {line['loss']:.4g} is a spike"
    if "rolled_back_to" in line:
        first = line["rolled_back_to"] + 1
        text += f"; weights and optimizer are again those of step {first - 1}, steps {first} to {step} are left out"
    return text
