"""A run folder to one page: RUN/report.html, self-contained, and its figures for machines, RUN/report.json.

In: config.yaml, metrics.jsonl, validation.jsonl, samples/evaluation.json with its videos, samples with a sidecar
NAME.json, run.json. Only the first two must exist; the page says of the others what is not there yet, so that a run
can be looked at while it trains. Out: the two files, each written whole or not at all.

Charts are SVG by matplotlib, drawn in sentinel colours that become CSS variables: one drawing serves the light and the
dark theme. Videos are embedded as base64, so the page can be mailed and opened anywhere; nothing is ever fetched.
Every word that comes from a caption, a configuration or a file name goes through `html.escape`.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from megasora.config import Config, every_key, read_yaml
from megasora.errors import MegaSoraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ATTRIBUTES = ("color", "direction", "shape", "background")  # what the detector reads back
SPELLED = {"color": "colour"}
PARTS = ("data", "forward", "backward", "optimizer")  # of a step's time, in the order in which they happen
COLUMNS = ("loss", "grad_norm", "rate", "tokens_per_second", "padding", "mfu", "time_step", *(f"time_{p}" for p in PARTS))
MEDIA = {".mp4": "video/mp4", ".png": "image/png"}

MAX_EVALUATED, MAX_OTHERS = 64, 16  # samples embedded
MAX_EMBEDDED = 10 << 20  # bytes of videos and images; base64 makes four thirds of it
SMALL = 256  # px; pictures up to this side are scaled up with their pixels kept square
NBSP, DASH = "\N{NO-BREAK SPACE}", "\N{EN DASH}"


def write_report(run_dir: Path) -> Path:
    """Write report.html and report.json into a run folder; returns the path of the page.

    Raises MegaSoraError where the folder, config.yaml or a step in metrics.jsonl is missing, or evaluation.json is
    not what the trainer writes.
    """
    run = read_run(Path(run_dir))
    figures = figures_of(run)
    page = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8")).substitute(
        name=escape(run.name),
        facts=show_facts(run),
        figures=show_figures(run, figures),
        loss=show_loss(run),
        samples=show_samples(run),
        speed=show_speed(run),
        optimizer=show_optimizer(run),
        config=show_config(run),
        reproduce=show_reproduce(run),
        notes=show_notes(run),  # last: the samples may have added some
    )
    replace_text(run.folder / "report.json", json.dumps(figures, indent=2, allow_nan=False) + "\n")
    return replace_text(run.folder / "report.html", page)


def replace_text(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


# ---------------------------------------------------------------- reading a run folder


@dataclass
class Sample:
    """A video or an image with its prompt; `expected` and `read` map attributes to words, where it was evaluated."""

    prompt: str
    file: Path
    size: tuple[int, int] | None = None  # height, width, px
    details: str = ""
    expected: dict[str, str] = field(default_factory=dict)
    read: dict[str, str | None] = field(default_factory=dict)
    held_out: bool = False


@dataclass
class Run:
    """All that was found in a run folder. `metrics` has arrays over the steps, NaN where there is no value."""

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
        raise MegaSoraError(f"no run folder {folder}; give the run.dir of a run, e.g. megasora report runs/demo")
    if not (folder / "metrics.jsonl").is_file():
        raise MegaSoraError(
            f"no {folder / 'metrics.jsonl'}: nothing was trained in {folder} yet; "
            f"run: torchrun --nproc-per-node 2 -m megasora.train CONFIG.yaml run.dir={folder}"
        )
    notes: list[str] = []
    records = read_records(folder / "metrics.jsonl", notes)
    if not records:
        raise MegaSoraError(f"{folder / 'metrics.jsonl'} holds no step; wait for the first step of the run, or train again")
    metrics = {key: np.array([number(record.get(key)) for record in records]) for key in COLUMNS}
    steps = np.array([record["step"] for record in records])
    broken = steps[~np.isfinite(metrics["loss"])]
    if len(broken):
        notes.append(f"The loss is not a finite number at {len(broken)} steps, the first of them step {broken[0]}.")

    validation = read_records(folder / "validation.jsonl", notes) if (folder / "validation.jsonl").is_file() else []
    evaluation = read_mapping(folder / "samples" / "evaluation.json")
    evaluated = read_evaluated(folder, evaluation, notes)
    return Run(
        folder=folder,
        name=folder.resolve().name,
        config=flatten(read_yaml(folder / "config.yaml")),
        steps=steps,
        metrics=metrics,
        validation=validation,
        evaluation=evaluation,
        evaluated=evaluated,
        others=read_others(folder, {sample.file for sample in evaluated}, notes),
        facts=read_mapping(folder / "run.json"),
        notes=notes,
    )


def read_records(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The lines of a JSONL file by step; of a step written twice (the run was resumed) the later line counts."""
    by_step: dict[int, dict[str, Any]] = {}
    unreadable, repeated = [], 0
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
        shown = ", ".join(map(str, unreadable[:5])) + (", ..." if len(unreadable) > 5 else "")
        notes.append(
            f"{path.name}: {len(unreadable)} of its lines cannot be read and were left out (line {shown}); "
            "a run that is killed while it writes leaves such a line."
        )
    if repeated:
        notes.append(f"{path.name}: {repeated} lines repeat a step after a resume; of each step the later line is shown.")
    return [by_step[step] for step in sorted(by_step)]


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MegaSoraError(f"{path} is not JSON: {error}; remove it, or make it again") from None
    if not isinstance(values, dict):
        raise MegaSoraError(f"{path} holds a {type(values).__name__}, not an object; remove it, or make it again")
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
            raise MegaSoraError(f"{path}: prompts[{place}].file={name} must be the name of a .mp4 or .png beside it")
        samples.append(sample)
    if len(samples) > MAX_EVALUATED:
        notes.append(f"{len(samples)} prompts were evaluated and counted; the videos of {MAX_EVALUATED} are shown.")
    return samples


def read_others(folder: Path, known: set[Path], notes: list[str]) -> list[Sample]:
    """Videos and images with a sidecar, in the run folder and in samples/; of NAME.mp4 and NAME.png the video."""
    samples: dict[Path, Sample] = {}
    for path in sorted([*folder.glob("*.*"), *(folder / "samples").glob("*.*")], key=lambda p: (p.suffix, p)):
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
    sides = size.lower().split("x") if isinstance(size, str) else size
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(str(side).isdigit() for side in sides):
        return None
    return int(sides[0]), int(sides[1])


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
    figures = {
        "steps": int(run.steps[-1]),
        "first_val_loss": plain(losses[0] if losses else None),
        "final_val_loss": plain(losses[-1] if losses else None),
        "padding_fraction": plain(np.average(padding[valid], weights=slots[valid]) if slots[valid].sum() > 0 else None),
        "tokens_per_second": plain(np.nanmedian(rate) if np.isfinite(rate).any() else None),
    }
    for attribute in ATTRIBUTES:
        reported = run.evaluation.get(f"{attribute}_accuracy")
        figures[f"{attribute}_accuracy"] = plain(share_right(run.evaluated, attribute) if reported is None else reported)
    for attribute in ATTRIBUTES:
        held_out = [sample for sample in run.evaluated if sample.held_out]
        figures[f"held_out_{attribute}_accuracy"] = plain(share_right(held_out, attribute))
    return figures


def plain(value: Any) -> float | None:
    """A finite Python float, or None: JSON has no NaN."""
    value = number(value) if value is None or isinstance(value, int | float) else float(value)
    return value if math.isfinite(value) else None


def share_right(samples: Iterable[Sample], attribute: str) -> float | None:
    marks = [s.read[attribute] == s.expected[attribute] for s in samples if attribute in s.expected]
    return sum(marks) / len(marks) if marks else None


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` steps, fewer at the ends; NaN does not count."""
    finite = np.isfinite(values)
    total = np.concatenate(([0.0], np.cumsum(np.where(finite, values, 0.0))))
    count = np.concatenate(([0], np.cumsum(finite)))
    place = np.arange(len(values))
    low, high = np.maximum(place - window // 2, 0), np.minimum(place + window // 2 + 1, len(values))
    counted = count[high] - count[low]
    return np.where(counted > 0, (total[high] - total[low]) / np.maximum(counted, 1), np.nan)


def thin(x: np.ndarray, y: np.ndarray, most: int = 1200) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points of a curve: the lowest and the highest of each stretch, so that no spike is lost."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= most:
        return x, y
    kept = [i[[int(y[i].argmin()), int(y[i].argmax())]] for i in np.array_split(np.arange(len(x)), most // 2)]
    kept = np.unique(np.concatenate(kept))
    return x[kept], y[kept]


# ---------------------------------------------------------------- charts

PAINTS = ("ink", "muted", "line", "accent", "second", *PARTS, "other")  # CSS variables of report.html


def paint(name: str) -> str:
    """The sentinel that stands for a CSS variable in matplotlib's SVG."""
    return f"#fe00{PAINTS.index(name):02x}"


def ramp(place: int, count: int) -> str:
    """CSS colour of bin `place` out of `count`, from the clean end to the noise end."""
    return f"color-mix(in oklch, var(--clean), var(--noise) {100 * place / max(count - 1, 1):.0f}%)"


def ramp_paint(place: int, count: int) -> str:
    return f"#fd{place:02x}{count:02x}"


def compact(value: float, _=None) -> str:
    """1234567 -> 1.23M, 12000 -> 12k, 0.00012 -> 1.2e-4."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2g}".split("e") if "e" in f"{value:.2g}" else f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"


def chart(title: str, about: str, legend: Iterable[tuple[str, str]], draw: Callable[[Axes], None]) -> str:
    """A figure of the page: title, a line of explanation, a legend of (CSS colour, text), and what `draw` draws.

    The explanation and the legend are HTML, so that they stay legible where the chart is scaled down.
    """
    import io

    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    width, height, left, right, top, bottom = 420, 224, 42, 10, 6, 34  # units of the SVG, about px
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10, "axes.linewidth": 1}):
        figure = Figure(figsize=(width / 72, height / 72))
        FigureCanvasSVG(figure)
        axes = figure.add_axes(
            (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
        )
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        axes.margins(x=0.02)
        draw(axes)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(paint("line"))
        axes.grid(axis="y", color=paint("line"), linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0, colors=paint("muted"), pad=5)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10), integer=True))
        if axes.get_yscale() == "linear":
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(compact))
        axes.yaxis.set_major_formatter(FuncFormatter(compact))
        axes.set_xlabel("step", color=paint("muted"), labelpad=2)
        sink = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(sink, format="svg", metadata=nothing)

    svg = sink.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*>", f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">', svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    svg = re.sub(r"font(-[a-z]+)?: [^;\"]*;? ?", "", svg)  # the font is the page's, its size follows the width: report.html
    svg = re.sub(r' d="[^"]*"', lambda d: re.sub(r"(\.\d\d)\d+", r"\1", d[0]), svg)
    svg = re.sub(r"#fe00([0-9a-f]{2})", lambda m: f"var(--{PAINTS[int(m[1], 16)]})", svg)
    svg = re.sub(r"#fd([0-9a-f]{2})([0-9a-f]{2})", lambda m: ramp(int(m[1], 16), int(m[2], 16)), svg)
    keys = "".join(f'<li><i style="background:{color}"></i>{escape(text)}</li>' for color, text in legend)
    return (
        f'<figure class="card chart"><figcaption><h3>{escape(title)}</h3><p>{escape(about)}</p>'
        f'<ul class="legend">{keys}</ul></figcaption>'
        f'<div class="plot" role="img" aria-label="{escape(title)}: {escape(about)}">{svg}</div></figure>'
    )


def set_range(axes: Axes, series: Iterable[np.ndarray], from_zero: bool = False) -> None:
    """Show the middle 99 % of the values, on a logarithmic axis where they span more than a factor of 20."""
    values = np.concatenate([np.asarray(each, dtype=float) for each in series])
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, high = np.quantile(values, (0.005, 0.995))
    if low > 0 and high / low > 20 and not from_zero:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(lambda *_: "")
        axes.set_ylim(low / 1.2, high * 1.2)
        return
    low = 0.0 if from_zero else low
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(0 if from_zero else low - margin, high + margin)


def noisy_chart(title: str, about: str, run: Run, values: np.ndarray, label: str, from_zero: bool = False) -> str:
    """A chart of one number a step: every step, faint, and its running mean."""
    window = max(1, len(values) // 40) | 1
    mean = smooth(values, window)

    def draw(axes: Axes) -> None:
        axes.plot(*thin(run.steps, values), color=paint("accent"), linewidth=0.7, alpha=0.3)
        axes.plot(*thin(run.steps, mean), color=paint("accent"), linewidth=1.8)
        set_range(axes, [values], from_zero)

    return chart(title, about, [("var(--accent)", f"{label}, mean of {window} steps")], draw)


# ---------------------------------------------------------------- sections of the page


def escape(value: Any) -> str:
    return html.escape(str(value), quote=True)


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}{NBSP}%"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f}{NBSP}s"
    minutes = round(seconds / 60)
    return f"{minutes}{NBSP}min" if minutes < 120 else f"{minutes // 60}{NBSP}h {minutes % 60:02d}{NBSP}min"


def plural(count: int, word: str) -> str:
    return f"{count:,}{NBSP}{word}" + ("" if count == 1 else "es" if word.endswith("s") else "s")


def section(anchor: str, title: str, body: str, about: str = "") -> str:
    lead = f'<p class="lead">{about}</p>' if about else ""
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{lead}{body}</section>'


def show_facts(run: Run) -> str:
    """Where and with what the run was made, one line under the title."""
    facts = run.facts
    parts = [str(facts[key]) for key in ("created", "device", "host") if facts.get(key)]
    if facts.get("world_size"):
        parts.append(plural(int(facts["world_size"]), "process"))
    parts += [f"{key} {facts[key]}" for key in ("megasora", "torch") if facts.get(key)]
    return "".join(f"<li>{escape(part)}</li>" for part in [str(run.folder), *parts])


def show_figures(run: Run, figures: dict[str, Any]) -> str:
    tiles: dict[bool, list[str]] = {False: [], True: []}  # with a meter: the accuracies

    def tile(label: str, value: str, about: str, meter: str = "") -> None:
        tiles[bool(meter)].append(
            f'<div class="card tile"><h3>{escape(label)}</h3><strong>{value}</strong>{meter}<p>{escape(about)}</p></div>'
        )

    first, last = figures["first_val_loss"], figures["final_val_loss"]
    if last is not None:
        change = f", {100 * (last / first - 1):+.0f}{NBSP}%".replace("-", "\N{MINUS SIGN}") if first else ""
        start = f"{first:.3f}" if first is not None else "?"
        about = f"at step {run.validation[0]['step']:,} and {run.validation[-1]['step']:,}{change}"
        tile("Validation loss", f"<small>{start} →</small> {last:.3f}", about)
    else:
        tile("Training loss", f"{np.nanmean(run.metrics['loss'][-50:]):.3f}", "mean of the last steps; not validated yet")
    seconds = float(np.nansum(run.metrics["time_step"]))
    planned = run.config.get("run.steps")
    of = f"of {planned:,}, " if isinstance(planned, int) and planned != figures["steps"] else ""
    tile("Steps", f"{figures['steps']:,}", f"{of}{duration(seconds)} of training")
    if figures["tokens_per_second"] is not None:
        mfu = run.metrics["mfu"][np.isfinite(run.metrics["mfu"])]
        about = "median, all processes" + (f"; MFU {percent(np.median(mfu), 1)}" if len(mfu) else "")
        tile("Tokens per second", compact(figures["tokens_per_second"]), about)
    if figures["padding_fraction"] is not None:
        tile("Padding", percent(figures["padding_fraction"], 2), "of the tokens in all packs")
    if run.facts.get("parameters"):
        tile("Parameters", compact(float(run.facts["parameters"])), f"{int(run.facts['parameters']):,}")
    for attribute in ATTRIBUTES:
        accuracy = figures[f"{attribute}_accuracy"]
        if accuracy is None:
            continue
        words = {sample.expected.get(attribute) for sample in run.evaluated} - {None}
        held_out = figures[f"held_out_{attribute}_accuracy"]
        about = [f"chance {percent(1 / len(words))}"] if words else []
        about += [f"held out {percent(held_out)}"] if held_out is not None else []
        mark = f'<b style="left:{100 / len(words):.1f}%"></b>' if words else ""
        meter = f'<div class="meter"><i style="width:{100 * accuracy:.1f}%"></i>{mark}</div>'
        tile(f"{SPELLED.get(attribute, attribute)} right".capitalize(), percent(accuracy), ", ".join(about), meter)
    return "".join(f'<div class="figures">{"".join(row)}</div>' for row in tiles.values() if row)


def show_samples(run: Run) -> str:
    if not run.evaluated and not run.others:
        return ""
    budget = MAX_EMBEDDED
    tiles: dict[bool, list[str]] = {True: [], False: []}
    for sample in [*run.evaluated[:MAX_EVALUATED], *run.others]:
        size = sample.file.stat().st_size if sample.file.is_file() else None
        shown = size is not None and size <= budget
        if size is None:
            run.notes.append(f"{sample.file.name} is named by evaluation.json and is not there.")
        elif not shown:
            run.notes.append(
                f"{sample.file.name} ({size / 2**20:.1f} MiB) was left out: a page embeds {MAX_EMBEDDED >> 20} MiB of samples."
            )
        budget -= size if shown else 0
        tiles[bool(sample.expected)].append(show_sample(sample, shown))

    parts, e = [], run.evaluation
    if tiles[True]:
        settings = [
            plural(len(run.evaluated), "prompt"),
            f"{e['size']}{NBSP}px" if e.get("size") else "",
            plural(int(e["frames"]), "frame") if e.get("frames") else "",
            f"{e['solver']}, {e.get('steps', '?')} steps" if e.get("solver") else "",
            f"guidance {e['guidance']}" if e.get("guidance") is not None else "",
            f"weights of step {e['step']:,}" if isinstance(e.get("step"), int) else "",
            f"sampled in {duration(float(e['seconds']))}" if e.get("seconds") else "",
        ]
        told = ", ".join(escape(part) for part in settings if part)
        held = sum(sample.held_out for sample in run.evaluated)
        about = (
            f"A detector reads from each video what it shows: {told}. "
            + (f"{plural(held, 'prompt')} held out: training never saw the combination. " if held else "")
            + "In the tables, rows were asked for and columns were read."
        )
        tables = "".join(confusion(run.evaluated, attribute) for attribute in ATTRIBUTES)
        controls = (
            '<div class="controls"><label><input type="checkbox" id="misses"> only videos with a miss</label>'
            '<button type="button" id="pause" hidden>pause</button></div>'
        )
        grid = f'<div class="samples">{"".join(tiles[True])}</div>'
        parts.append(section("samples", "Prompts, read back", f'<div class="tables">{tables}</div>{controls}{grid}', about))
    if tiles[False]:
        grid = f'<div class="samples large">{"".join(tiles[False])}</div>'
        parts.append(section("more-samples", "More samples" if tiles[True] else "Samples", grid))
    return "".join(parts)


def show_sample(sample: Sample, shown: bool) -> str:
    wrong = [a for a in sample.expected if sample.read[a] != sample.expected[a]]
    small = sample.size is None or max(sample.size) <= SMALL
    style = f' style="aspect-ratio:{sample.size[1]}/{sample.size[0]}"' if sample.size else ""
    attributes = f'class="{"pixels" if small else ""}"{style}'
    if shown:
        data = f"data:{MEDIA[sample.file.suffix]};base64,{base64.b64encode(sample.file.read_bytes()).decode('ascii')}"
        if sample.file.suffix == ".mp4":
            picture = f'<video {attributes} autoplay loop muted playsinline src="{data}"></video>'
        else:
            picture = f'<img {attributes} alt="{escape(sample.prompt)}" src="{data}">'
    else:
        picture = f'<div class="absent"{style}>{escape(sample.file.name)} is not on this page</div>'
    marks = ""
    for attribute in ("color", "shape", "direction"):
        if attribute in sample.expected:
            asked, read = sample.expected[attribute], sample.read[attribute]
            about = f"{SPELLED.get(attribute, attribute)}: asked {asked}, read {read or 'nothing'}"
            kind, mark = "right", f"✓{NBSP}{escape(asked)}"
            if attribute in wrong:
                kind, mark = "wrong", f"✗{NBSP}<s>{escape(asked)}</s>{NBSP}{escape(read or '?')}"
            marks += f'<li class="{kind}" title="{escape(about)}">{mark}</li>'
    flag = '<span class="held" title="training never saw this combination">held out</span>' if sample.held_out else ""
    details = f"<p>{escape(sample.details)}</p>" if sample.details else ""
    return (
        f'<figure class="sample{"" if wrong else " perfect"}"><div class="picture">{picture}{flag}</div>'
        f"<figcaption>{escape(sample.prompt)}{details}"
        + (f'<ul class="marks">{marks}</ul>' if marks else "")
        + "</figcaption></figure>"
    )


def confusion(samples: list[Sample], attribute: str) -> str:
    """Table of what was asked (rows) and what was read (columns), counts of videos."""
    pairs = [(s.expected[attribute], s.read[attribute]) for s in samples if attribute in s.expected]
    asked = list(dict.fromkeys(want for want, _ in pairs))
    if len(asked) < 2:
        return ""
    extra = list(dict.fromkeys(got for _, got in pairs if got is not None and got not in asked))
    read = [*asked, *extra, *([None] if any(got is None for _, got in pairs) else [])]
    head = "".join(f'<th scope="col">{escape("none" if word is None else word)}</th>' for word in read)
    rows = []
    for want in asked:
        counts = [pairs.count((want, got)) for got in read]
        cells = "".join(
            f'<td class="{"hit" if got == want else "miss"}" style="--share:{100 * n / max(sum(counts), 1):.0f}%">'
            f"{n or '·'}</td>"
            for got, n in zip(read, counts, strict=True)
        )
        rows.append(f'<tr><th scope="row">{escape(want)}</th>{cells}</tr>')
    title = SPELLED.get(attribute, attribute).capitalize()
    return (
        f'<div class="card"><table class="confusion"><caption>{title}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def show_loss(run: Run) -> str:
    loss = run.metrics["loss"]
    window = max(1, len(loss) // 40) | 1
    mean = smooth(loss, window)
    steps = np.array([record["step"] for record in run.validation])
    valued = np.array([number(record.get("loss")) for record in run.validation])

    def draw_loss(axes: Axes) -> None:
        axes.plot(*thin(run.steps, loss), color=paint("accent"), linewidth=0.7, alpha=0.3)
        axes.plot(*thin(run.steps, mean), color=paint("accent"), linewidth=1.8)
        marker = "o" if len(steps) <= 40 else ""
        axes.plot(steps, valued, color=paint("second"), linewidth=1.6, marker=marker, markersize=4)
        set_range(axes, [loss, valued])

    legend = [("var(--accent)", f"training, mean of {window} steps")]
    if len(steps):
        legend.append(("var(--second)", f"validation, {plural(len(steps), 'time')}"))
    about = "Mean squared error of the predicted velocity. Faint: every step."
    charts = [chart("Training and validation loss", about, legend, draw_loss)]

    edges = sorted({(number(b.get("low")), number(b.get("high"))) for r in run.validation for b in r.get("bins") or []})
    if edges:
        curves = np.full((len(edges), len(steps)), math.nan)
        for column, record in enumerate(run.validation):
            for b in record.get("bins") or []:
                curves[edges.index((number(b.get("low")), number(b.get("high")))), column] = number(b.get("loss"))

        def draw_bins(axes: Axes) -> None:
            for place, curve in enumerate(curves):
                marker = "o" if len(steps) <= 40 else ""
                axes.plot(
                    steps, curve, color=ramp_paint(place, len(edges)), linewidth=1.6, marker=marker, markersize=3.2
                )
            set_range(axes, curves)

        legend = [
            (ramp(place, len(edges)), f"{low:.2g}{DASH}{high:.2g}: {curves[place][-1]:.3f}")
            for place, (low, high) in enumerate(edges)
        ]
        about = "Fixed clips and noise; t = 0 is clean, t = 1 is noise. With the last loss of each bin."
        charts.append(chart("Validation loss by timestep", about, legend, draw_bins))
    return section("loss", "Loss", f'<div class="charts">{"".join(charts)}</div>')


def show_speed(run: Run) -> str:
    m = run.metrics
    about = "Tokens of clips, padding not counted, all processes together. Faint: every step."
    charts = [noisy_chart("Throughput", about, run, m["tokens_per_second"], "tokens per second", from_zero=True)]

    times = np.array([m[f"time_{part}"] for part in PARTS])
    if np.isfinite(times).any():
        names = list(PARTS)
        rest = m["time_step"] - np.nansum(times, axis=0)
        if np.nansum(rest) > 0.01 * np.nansum(m["time_step"]):
            names, times = [*names, "other"], np.vstack((times, np.maximum(rest, 0)))
        total = np.nansum(times)
        stretches = np.array_split(np.arange(len(run.steps)), min(len(run.steps), 160))
        x = [run.steps[stretch].mean() for stretch in stretches]
        stacked = 1e3 * np.array([[np.nan_to_num(row[s]).mean() for s in stretches] for row in times])

        def draw_times(axes: Axes) -> None:
            axes.stackplot(x, stacked, colors=[paint(name) for name in names], linewidth=0)
            set_range(axes, [stacked.sum(axis=0)], from_zero=True)

        legend = [
            (f"var(--{name})", f"{name} {percent(np.nansum(row) / total)}")
            for name, row in zip(names, times, strict=True)
        ]
        mean = 1e3 * np.nanmean(m["time_step"])
        about = f"Milliseconds; {mean:.3g} ms on average. With the share of each part in the run."
        charts.append(chart("Time of a step", about, legend, draw_times))
    if np.isfinite(m["mfu"]).any():
        about = "Model FLOPs in use: the share of the peak of the GPUs, in %."
        charts.append(noisy_chart("MFU", about, run, 100 * m["mfu"], "MFU", from_zero=True))
    return section("speed", "Speed", f'<div class="charts">{"".join(charts)}</div>')


def show_optimizer(run: Run) -> str:
    m = run.metrics
    clip = run.config.get("optim.clip")
    above = float(np.mean(m["grad_norm"][np.isfinite(m["grad_norm"])] > clip)) if isinstance(clip, int | float) else None
    about = "Global norm before clipping."
    if above is not None:
        about += f" Above optim.clip = {clip:g} in {percent(above)} of the steps."

    warmup, final = run.config.get("optim.warmup"), run.config.get("optim.final_rate")
    told = f"Warm-up of {warmup} steps, then a cosine that ends at {final} of optim.rate."

    def draw_rate(axes: Axes) -> None:
        axes.plot(*thin(run.steps, m["rate"]), color=paint("accent"), linewidth=1.8)
        set_range(axes, [m["rate"]], from_zero=True)

    charts = [
        noisy_chart("Gradient norm", about, run, m["grad_norm"], "gradient norm"),
        chart("Learning rate", told, [("var(--accent)", "rate")], draw_rate),
        noisy_chart("Padding", "Share of the tokens in the packs, in %.", run, 100 * m["padding"], "padding", from_zero=True),
    ]
    return section("optimizer", "Optimizer and packs", f'<div class="charts three">{"".join(charts)}</div>')


def setting(value: Any) -> str:
    return escape(value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False))


def show_config(run: Run) -> str:
    """What differs from the defaults, and the whole resolved configuration."""
    defaults = flatten(dataclasses.asdict(Config()))
    known = every_key(Config)
    keys = sorted(run.config, key=lambda key: known.index(key) if key in known else len(known))
    rows, sections = [], {}
    for key in keys:
        value, default = run.config[key], defaults.get(key)
        changed = key not in defaults or value != default
        shown = setting(value)
        if changed:
            was = setting(default) if key in defaults else "not a key of this version"
            rows.append(f'<tr><th scope="row">{escape(key)}</th><td>{shown}</td><td>{was}</td></tr>')
        name, _, rest = key.partition(".")
        kind = ' class="changed"' if changed else ""
        sections.setdefault(name, []).append(f"<div{kind}><dt>{escape(rest)}</dt><dd>{shown}</dd></div>")
    table = (
        '<div class="card"><table class="settings"><thead><tr><th scope="col">key</th><th scope="col">this run</th>'
        f'<th scope="col">default</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        if rows
        else "<p>Every setting has its default.</p>"
    )
    lists = "".join(
        f'<div class="settings-of"><h3>{escape(name)}</h3><dl>{"".join(s)}</dl></div>' for name, s in sections.items()
    )
    details = (
        f'<details class="card"><summary>all {len(keys)} settings, the changed ones marked</summary>'
        f'<div class="all">{lists}</div></details>'
    )
    return section("config", "Configuration", table + details, f"{len(rows)} of {len(keys)} settings differ from the defaults.")


def show_reproduce(run: Run) -> str:
    folder, world = str(run.folder), int(run.facts.get("world_size") or 1)
    launched = run.facts.get("command")
    lines = []
    if launched:
        words = launched if isinstance(launched, str) else shlex.join(map(str, launched))
        lines += ["# as it was launched", words, ""]
    lines += [
        "# the same run again, into another folder, from the resolved configuration",
        f"torchrun --nproc-per-node {world} -m megasora.train {shlex.quote(f'{folder}/config.yaml')} "
        f"run.dir={shlex.quote(f'{folder}-again')}",
        "",
        "# this page",
        f"megasora report {shlex.quote(folder)}",
    ]
    shards = run.config.get("data.shards")
    about = f"It reads the shards in <code>{escape(shards)}</code>, made by <code>megasora ingest</code>." if shards else ""
    return section("reproduce", "How to reproduce it", f'<pre class="card">{escape(chr(10).join(lines))}</pre>', about)


def show_notes(run: Run) -> str:
    """What was left out or repaired; nothing where there is nothing to say."""
    if not run.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    return section("notes", "Notes", f'<ul class="notes">{items}</ul>')
