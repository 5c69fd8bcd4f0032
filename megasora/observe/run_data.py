"""Reads a run folder for the report: configuration, metrics per step, validations, evaluation and samples."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megasora.config import load_run_config
from megasora.errors import MegaSoraError, printable
from megasora.jsonl import parse_json
from megasora.observe.formatting import NBSP, pluralize
from megasora.observe.json_kinds import MAX_NUMBER, is_kind, keep_kinds, read_object

ATTRIBUTES = ("color", "direction", "shape", "background")  # what the detector recognizes in a clip
STEP_PHASES = ("data", "forward", "backward", "optimizer")  # metrics time_data, ..., in the order of a step
METRICS = ["loss", "grad_norm", "lr", "tokens_per_second", "padding_fraction", "mfu", "peak_memory_gib"]
METRICS += ["time_step", *(f"time_{phase}" for phase in STEP_PHASES)]
# of a run of megasora.train_codec: the terms of its loss, and what a step tells of the codec
LOSS_TERMS = ("l1", "mse", "gradient", "ssim", "lpips", "kl", "commitment", "adversarial", "discriminator")
METRICS += [*LOSS_TERMS, "psnr", "perplexity", "clips_per_second"]
MAX_LINE = 1 << 20  # bytes
# what the page shows of files that a person may have edited; values of other kinds are left out
RUN_INFO = {"task": str, "created": str, "machine": str, "device": str, "megasora": str, "torch": str}
RUN_INFO |= {"world_size": int, "parameters": int, "layout": dict}
EVALUATION = {"prompts": list, "frames": int, "num_inference_steps": int, "solver": str, "step": int}
EVALUATION |= {"guidance_scale": float, "seconds": float}
MEDIA_TYPES = {".mp4": "video/mp4", ".png": "image/png"}


@dataclass
class Sample:
    """A sampled video or image. `expected`, `detected`: attribute -> word, if it was evaluated."""

    prompt: str
    file: Path
    size: tuple[int, int] | None = None  # height, width, px
    details: str = ""
    expected: dict[str, str] = field(default_factory=dict)
    detected: dict[str, str | None] = field(default_factory=dict)
    held_out: bool = False


@dataclass
class RunData:
    """Contents of a run folder. `metrics`: one array [steps] per metric, NaN where a step has no value."""

    folder: Path
    name: str
    config: dict[str, Any]  # dotted key -> value
    steps: np.ndarray
    metrics: dict[str, np.ndarray]
    validations: list[dict[str, Any]]  # lines of validation.jsonl
    evaluation: dict[str, Any]  # samples/evaluation.json
    evaluated_samples: list[Sample]
    other_samples: list[Sample]
    run_info: dict[str, Any]  # run.json
    notes: list[str]  # what was skipped or repeated, for the end of the page


def read_run_data(folder: Path) -> RunData:
    """Raises MegaSoraError if the folder has no readable step in metrics.jsonl, or a JSON file is invalid."""
    if not folder.is_dir():
        raise MegaSoraError(f"no run folder {folder}; give the run.dir of a run: megasora report runs/demo")
    path, notes = folder / "metrics.jsonl", []
    if not path.is_file():
        raise MegaSoraError(f"no file {path}: nothing was trained here yet; train first, see README.md")
    lines = read_steps(path, notes)
    if not lines:
        raise MegaSoraError(f"{path} holds no step that can be read; wait for the first one, or train again")
    steps = np.array([line["step"] for line in lines])
    metrics = {key: np.array([to_float(line.get(key)) for line in lines]) for key in METRICS}
    non_finite = steps[~np.isfinite(metrics["loss"])]
    if len(non_finite):
        notes.append(f"The loss is not finite at {pluralize(len(non_finite), 'step')}, first at {non_finite[0]}.")
    evaluation_file = folder / "samples" / "evaluation.json"
    evaluation = keep_kinds(read_object(evaluation_file), EVALUATION)
    run_info = keep_kinds(read_object(folder / "run.json"), RUN_INFO)
    layout = run_info.get("layout", {})
    evaluated = read_evaluated_samples(evaluation_file, evaluation)
    return RunData(
        folder=folder,
        name=folder.resolve().name,
        config=flatten(asdict(load_run_config(folder))),
        steps=steps,
        metrics=metrics,
        validations=[{**v, "bins": readable_bins(v)} for v in read_steps(folder / "validation.jsonl", notes)],
        evaluation=evaluation,
        evaluated_samples=evaluated,
        other_samples=read_other_samples(folder, {sample.file for sample in evaluated}),
        run_info={**run_info, "layout": keep_kinds(layout, dict.fromkeys(layout, int))},
        notes=notes,
    )


def read_steps(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The lines of a JSONL file, sorted by step. Of a step that was repeated after a resume, the later line counts.

    Returns [] if there is no file. Lines that cannot be read are skipped; `notes` reports them.
    """
    by_step: dict[int, dict[str, Any]] = {}
    unreadable, repeated = [], 0
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        for line_number, text in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
            if not text.strip():
                continue
            try:
                line = parse_json(text)
            except ValueError:
                line = None
            if not isinstance(line, dict) or not is_kind(line.get("step"), int):
                unreadable.append(line_number)
                continue
            repeated += line["step"] in by_step
            by_step[line["step"]] = line
    if unreadable:
        notes.append(
            f"{path.name}: skipped {pluralize(len(unreadable), 'line')} that cannot be read, the first is line "
            f"{unreadable[0]}; a run that is killed while it writes leaves such a line."
        )
    if repeated:
        notes.append(f"{path.name}: {pluralize(repeated, 'line')} repeated after a resume; the later ones count.")
    return [by_step[step] for step in sorted(by_step)]


def readable_bins(line: dict[str, Any]) -> list[dict[str, Any]]:
    """The timestep bins of a line of validation.jsonl that have their two ends and a loss."""
    bins = line.get("bins")
    bins = [b for b in bins if isinstance(b, dict)] if isinstance(bins, list) else []
    return [b for b in bins if is_kind(b.get("low"), float) and is_kind(b.get("high"), float) and "loss" in b]


def read_evaluated_samples(path: Path, evaluation: dict[str, Any]) -> list[Sample]:
    """The samples listed by samples/evaluation.json (`path`, with the contents `evaluation`)."""
    samples = []
    for index, entry in enumerate(evaluation.get("prompts") or []):
        try:
            prompt, expected, detected, name = entry["prompt"], entry["expected"], entry["detected"], entry["file"]
            sample = Sample(
                prompt=str(prompt),
                file=path.parent / str(name),
                size=parse_pixels(entry.get("size", evaluation.get("size"))),
                expected={a: str(expected[a]) for a in ATTRIBUTES if a in expected},
                detected={a: text_or_none(detected.get(a)) for a in ATTRIBUTES if a in expected},
                held_out=bool(entry.get("held_out")),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise MegaSoraError(
                f"{path}: prompts[{index}] has no usable prompt, expected, detected and file ({error!r}); "
                "remove the file and evaluate again"
            ) from None
        if Path(str(name)).name != str(name) or sample.file.suffix not in MEDIA_TYPES:
            shown = printable(str(name), 60)
            raise MegaSoraError(f"{path}: prompts[{index}].file={shown} must name a .mp4 or .png file in its folder")
        samples.append(sample)
    return samples


def read_other_samples(folder: Path, evaluated: set[Path]) -> list[Sample]:
    """Videos and images with a sidecar NAME.json, in the run folder and in samples/, except evaluated ones.

    If NAME.mp4 and NAME.png exist, only the video is returned.
    """
    samples: dict[Path, Sample] = {}
    files = [*folder.glob("*.*"), *(folder / "samples").glob("*.*")]
    for path in sorted(files, key=lambda path: (path.suffix, path)):  # .mp4 before .png
        sidecar = path.with_suffix(".json")
        if path.suffix not in MEDIA_TYPES or path in evaluated or sidecar in samples or not sidecar.is_file():
            continue
        settings = read_object(sidecar)
        if isinstance(settings.get("prompt"), str):
            size = parse_pixels(settings.get("size"))
            samples[sidecar] = Sample(settings["prompt"], path, size, sample_details(settings, size))
    return list(samples.values())


def sample_details(settings: dict[str, Any], size: tuple[int, int] | None) -> str:
    """'48×80 px, 17 frames, seed 3, guidance 4': the settings of a sample that its sidecar has."""
    frames = settings.get("frames")
    details = [
        f"{size[0]}\N{MULTIPLICATION SIGN}{size[1]}{NBSP}px" if size else "",
        "image" if frames == 1 else f"{frames}{NBSP}frames" if frames else "",
        f"seed{NBSP}{settings['seed']}" if "seed" in settings else "",
        f"guidance{NBSP}{settings['guidance_scale']}" if "guidance_scale" in settings else "",
    ]
    return ", ".join(detail for detail in details if detail)


def to_float(value: Any) -> float:
    """A float; NaN for null, a missing value and anything else that is not a number, or too large a one."""
    return float(value) if isinstance(value, int | float) and abs(value) < MAX_NUMBER else math.nan


def text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def parse_pixels(size: Any) -> tuple[int, int] | None:
    """'48x80' or [48, 80] -> (48, 80); None for anything else."""
    text = "x".join(map(str, size)) if isinstance(size, list) else str(size)
    match = re.fullmatch("([0-9]{1,6})x([0-9]{1,6})", text.lower())
    return (int(match[1]), int(match[2])) if match else None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = f"{prefix}.{key}".strip(".")
        flat |= flatten(value, dotted) if isinstance(value, dict) else {dotted: value}
    return flat
