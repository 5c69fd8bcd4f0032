"""Whether the evaluation prompts of a run were already sampled with its newest checkpoint; if not, samples them."""

from __future__ import annotations

from pathlib import Path

from megasora.checkpoint.store import CheckpointStore
from megasora.config import load_run_config
from megasora.files import read_regular_file
from megasora.jsonl import parse_json

MAX_RESULT_BYTES = 64 << 20  # of evaluation.json


def evaluate_if_due(run: Path) -> None:
    """Samples the run's evaluation prompts, unless this was already done with the newest checkpoint."""
    if not (run / "config.yaml").is_file():
        return
    config = load_run_config(run)
    newest = CheckpointStore(run / "checkpoints").newest()
    if not config.evaluation.prompts or newest is None:
        return
    result = run / "samples" / "evaluation.json"
    if evaluated_checkpoint(result) == newest.name:
        return
    from megasora.sampling.evaluate import evaluate
    from megasora.sampling.sampler import Sampler

    evaluate(Sampler.from_run(run), run / "samples", config.evaluation.prompts, config.run.seed)


def evaluated_checkpoint(result: Path) -> str | None:
    """The name of the checkpoint of evaluation.json; None if there is no such file, or it is damaged."""
    try:
        return f"step-{parse_json(read_regular_file(result, MAX_RESULT_BYTES))['step']:08d}"
    except (OSError, ValueError, TypeError, KeyError):
        return None
