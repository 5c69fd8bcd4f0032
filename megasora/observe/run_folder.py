"""A run folder as the report reads it: configuration, steps, validations, samples, and the figures made of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megasora.config import read_yaml
from megasora.errors import MegaSoraError

ATTRIBUTES = ("color", "direction", "shape", "background")  # what the detector reads back
PARTS = ("data", "forward", "backward", "optimizer")  # of a step's time, in the order in which they happen
COLUMNS = ["loss", "grad_norm", "rate", "tokens_per_second", "padding", "mfu", "memory_gib"]
COLUMNS += ["time_step", *(f"time_{part}" for part in PARTS)]
MEDIA = {".mp4": "video/mp4", ".png": "image/png"}
MAX_EVALUATED, MAX_OTHERS = 64, 16  # samples shown
NBSP = "\N{NO-BREAK SPACE}"


@dataclass
class Sample:
    """A video or an image with its prompt. `expected`, `read`: attribute -> word, where it was evaluated."""

    prompt: str
    file: Path
    size: tuple[int, int] | None = None  # height, width, px
    details: str = ""
    expected: dict[str, str] = field(default_factory=dict)
    read: dict[str, str | None] = field(default_factory=dict)
    held_out: bool = False


@dataclass
class Run:
    """All that was found in a run folder. `metrics`: arrays over the steps, NaN where there is no value."""

    folder: Path
    name: str
    config: dict[str, Any]
    steps: np.ndarray
    metrics: dict[str, np.ndarray]
    validation: list[dict[str, Any]]
    evaluation: dict[str, Any]
    evaluated: list[Sample]
    others: list[Sample]
    facts: dict[str, Any]
    notes: list[str]


def read_run(folder: Path) -> Run:
    if not folder.is_dir():
        raise MegaSoraError(f"no run folder {folder}; give the run.dir of a run: megasora report runs/demo")
    path, notes = folder / "metrics.jsonl", []
    if not path.is_file():
        raise MegaSoraError(f"no file {path}: nothing was trained here yet; train first, see README.md")
    records = read_records(path, notes)
    if not records:
        raise MegaSoraError(f"{path} holds no step that can be read; wait for the first one, or train again")
    metrics = {key: np.array([number(record.get(key)) for record in records]) for key in COLUMNS}
    steps = np.array([record["step"] for record in records])
    broken = steps[~np.isfinite(metrics["loss"])]
    if len(broken):
        notes.append(f"The loss is no finite number at {plural(len(broken), 'step')}, first at {broken[0]}.")
    evaluation = read_mapping(folder / "samples" / "evaluation.json")
    evaluated = read_evaluated(folder, evaluation, notes)
    return Run(
        folder=folder,
        name=folder.resolve().name,
        config=flatten(read_yaml(folder / "config.yaml")),
        steps=steps,
        metrics=metrics,
        validation=read_records(folder / "validation.jsonl", notes),
        evaluation=evaluation,
        evaluated=evaluated,
        others=read_others(folder, {sample.file for sample in evaluated}, notes),
        facts=read_mapping(folder / "run.json"),
        notes=notes,
    )


def read_records(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The lines of a JSONL file in order of step; of a step written twice (a resume) the later line counts.

    No file is no lines. A line that a killed run left torn is left out, and `notes` says so.
    """
    by_step: dict[int, dict[str, Any]] = {}
    unreadable, repeated = [], 0
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for place, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                unreadable.append(place)
                continue
            repeated += record["step"] in by_step
            by_step[record["step"]] = record
    if unreadable:
        notes.append(
            f"{path.name}: left out {plural(len(unreadable), 'line')} that cannot be read, first line "
            f"{unreadable[0]}; a run that is killed while it writes leaves such a line."
        )
    if repeated:
        notes.append(f"{path.name}: {plural(repeated, 'line')} repeated by a resume; the later ones count.")
    return [by_step[step] for step in sorted(by_step)]


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MegaSoraError(f"{path} is not JSON: {error}; remove it or remake it") from None
    if not isinstance(values, dict):
        raise MegaSoraError(f"{path} holds a {type(values).__name__}, not an object; remove it or remake it")
    return values


def read_evaluated(folder: Path, evaluation: dict[str, Any], notes: list[str]) -> list[Sample]:
    path, samples = folder / "samples" / "evaluation.json", []
    for place, entry in enumerate(evaluation.get("prompts") or []):
        try:
            prompt, expected, read, name = entry["prompt"], entry["expected"], entry["read"], entry["file"]
            sample = Sample(
                prompt=str(prompt),
                file=path.parent / str(name),
                size=pixels(entry.get("size", evaluation.get("size"))),
                expected={a: str(expected[a]) for a in ATTRIBUTES if a in expected},
                read={a: read.get(a) for a in ATTRIBUTES if a in expected},
                held_out=bool(entry.get("held_out")),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise MegaSoraError(
                f"{path}: prompts[{place}] has no usable prompt, expected, read and file ({error!r}); "
                "remove the file and evaluate again"
            ) from None
        if Path(str(name)).name != str(name) or sample.file.suffix not in MEDIA:
            raise MegaSoraError(f"{path}: prompts[{place}].file={name} must name a .mp4 or .png beside it")
        samples.append(sample)
    if len(samples) > MAX_EVALUATED:
        notes.append(f"{len(samples)} prompts were evaluated and counted; {MAX_EVALUATED} of them are shown.")
    return samples


def read_others(folder: Path, known: set[Path], notes: list[str]) -> list[Sample]:
    """Videos and images with a sidecar, in the run folder and samples/; of NAME.mp4, NAME.png the video."""
    samples: dict[Path, Sample] = {}
    files = [*folder.glob("*.*"), *(folder / "samples").glob("*.*")]
    for path in sorted(files, key=lambda path: (path.suffix, path)):  # .mp4 before .png
        sidecar = path.with_suffix(".json")
        if path.suffix not in MEDIA or path in known or sidecar in samples or not sidecar.is_file():
            continue
        about = read_mapping(sidecar)
        if not isinstance(about.get("prompt"), str):
            continue
        size = pixels(about.get("size"))
        frames = about.get("frames")
        details = [
            f"{size[0]}\N{MULTIPLICATION SIGN}{size[1]}{NBSP}px" if size else "",
            "image" if frames == 1 else f"{frames}{NBSP}frames" if frames else "",
            *(f"{key}{NBSP}{about[key]}" for key in ("seed", "guidance") if key in about),
        ]
        samples[sidecar] = Sample(about["prompt"], path, size, ", ".join(part for part in details if part))
    if len(samples) > MAX_OTHERS:
        notes.append(f"{len(samples)} samples have a sidecar; the first {MAX_OTHERS} are shown.")
    return list(samples.values())[:MAX_OTHERS]


def number(value: Any) -> float:
    """A float; NaN for null, a missing value and anything else that is no number."""
    return float(value) if isinstance(value, int | float) else math.nan


def pixels(size: Any) -> tuple[int, int] | None:
    """'48x80' or [48, 80] -> (48, 80); None for anything else."""
    text = "x".join(map(str, size)) if isinstance(size, list) else str(size)
    match = re.fullmatch(r"(\d+)x(\d+)", text.lower())
    return (int(match[1]), int(match[2])) if match else None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        full = f"{prefix}.{key}".strip(".")
        flat |= flatten(value, full) if isinstance(value, dict) else {full: value}
    return flat


# ---------------------------------------------------------------- the figures


def figures_of(run: Run) -> dict[str, Any]:
    """What goes into report.json: plain numbers, None where the run has no such figure."""
    rate, padding = run.metrics["tokens_per_second"], run.metrics["padding"]
    losses = [number(record.get("loss")) for record in run.validation]
    # tokens_per_second counts the tokens of clips; with the padding they fill the slots of the packs
    slots = rate * run.metrics["time_step"] / (1 - np.minimum(padding, 1 - 1e-9))
    valid = np.isfinite(slots) & np.isfinite(padding)
    padded = float((padding * slots)[valid].sum())
    figures = {
        "steps": int(run.steps[-1]),
        "first_val_loss": plain(losses[0] if losses else None),
        "final_val_loss": plain(losses[-1] if losses else None),
        "padding_fraction": plain(padded / slots[valid].sum()) if valid.any() else None,
        "tokens_per_second": plain(np.nanmedian(rate)) if np.isfinite(rate).any() else None,
    }
    for attribute in ATTRIBUTES:
        key = f"{attribute}_accuracy"
        figures[key] = plain(run.evaluation.get(key, share_right(run.evaluated, attribute)))
    held_out = [sample for sample in run.evaluated if sample.held_out]
    for attribute in ATTRIBUTES:
        figures[f"held_out_{attribute}_accuracy"] = plain(share_right(held_out, attribute))
    return figures


def plain(value: Any) -> float | None:
    """A finite Python float, or None: JSON has no NaN."""
    value = number(value)
    return value if math.isfinite(value) else None


def share_right(samples: Iterable[Sample], attribute: str) -> float | None:
    marks = [s.read[attribute] == s.expected[attribute] for s in samples if attribute in s.expected]
    return sum(marks) / len(marks) if marks else None


def plural(count: int, word: str) -> str:
    return f"{count:,}{NBSP}{word}" + ("" if count == 1 else "es" if word.endswith("s") else "s")
