"""summarize_runs.py RUNS OUT.json: medians of the second half of each run, and differences of losses."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

COMPARED = (  # twice the same run; a resumed run and an uninterrupted one; kernel backends; orders of sums
    ("repeat", "small-4k"),
    ("resumed", "repeat"),
    ("torch-kernels", "repeat"),
    ("wan-any-order", "wan"),
)


def read_metrics(run: Path) -> list[dict]:
    """Lines of metrics.jsonl in the order of steps; of a repeated step, the last."""
    lines = {}
    for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        lines[line["step"]] = line
    return [lines[step] for step in sorted(lines)]


def summarize(metrics: list[dict]) -> dict:
    half = metrics[len(metrics) // 2 :]
    keys = [key for key, value in half[0].items() if isinstance(value, int | float) and key not in ("step", "lr")]
    return {
        "steps": len(metrics),
        "first_loss": metrics[0]["loss"],
        "last_loss": metrics[-1]["loss"],
        "slowest_step_seconds": max(line["time_step"] for line in metrics),
        **{key: statistics.median(line[key] for line in half) for key in keys},
    }


def compare(a: list[dict], b: list[dict]) -> dict:
    pairs = [(x["loss"], y["loss"]) for x, y in zip(a, b, strict=False)]
    return {
        "steps": len(pairs),
        "largest_relative_difference": max(abs(x - y) / abs(y) for x, y in pairs),
        "bitwise_equal": all(x == y for x, y in pairs),
    }


def main() -> None:
    runs = {path.parent.name: read_metrics(path.parent) for path in sorted(Path(sys.argv[1]).glob("*/metrics.jsonl"))}
    runs = {name: metrics for name, metrics in runs.items() if metrics}
    result = {name: summarize(metrics) for name, metrics in runs.items()}
    for a, b in COMPARED:
        if a in runs and b in runs:
            result[f"{a} and {b}"] = compare(runs[a], runs[b])
    Path(sys.argv[2]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, figures in result.items():
        print(name, {key: round(value, 5) if isinstance(value, float) else value for key, value in figures.items()})


if __name__ == "__main__":
    main()
