"""Whether the evaluation prompts of a run were already sampled with its newest checkpoint; if not, samples them."""

from __future__ import annotations

from pathlib import Path

from megasora.checkpoint.store import CheckpointStore
from megasora.config import load_run_config
from megasora.files import read_regular_file
from megasora.jsonl import parse_json

MAX_RESULT_BYTES = 64 << 20  # of evaluation.json


def evaluate_if_due(run: Path, weights: str = "ema") -> None:
    """Samples the prompts of `evaluation`, unless this was done with these weights of the newest checkpoint."""
    if not (run / "config.yaml").is_file():
        return
    config = load_run_config(run)
    newest = CheckpointStore(run / "checkpoints").newest()
    if not config.evaluation.prompts or newest is None:
        return
    result = run / "samples" / "evaluation.json"
    if evaluated_checkpoint(result) == (newest.name, weights):
        return
    from megasora.sampling.evaluate import evaluate
    from megasora.sampling.sampler import Sampler

    sampler = Sampler.from_run(run, weights)
    evaluate(sampler, run / "samples", config.evaluation.prompts, config.run.seed, weights)


def evaluated_checkpoint(result: Path) -> tuple[str, str] | None:
    """The name of the checkpoint of evaluation.json and which of its weights; None if there is no such file, or it is
    damaged."""
    try:
        values = parse_json(read_regular_file(result, MAX_RESULT_BYTES))
        return f"step-{values['step']:08d}", values.get("weights", "ema")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
