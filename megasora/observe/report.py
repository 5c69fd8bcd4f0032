"""A run folder to one page, RUN/report.html, and its figures for machines, RUN/report.json.

In: config.yaml, metrics.jsonl, validation.jsonl, samples/evaluation.json with its videos, samples with a
sidecar NAME.json, run.json. Only the first two must exist, so that a run can be looked at while it trains.
Out: the two files, each written whole or not at all.

The page stands alone: videos are embedded as base64 and nothing is ever fetched, so it can be mailed and
opened anywhere. Charts are SVG by matplotlib, drawn in sentinel colours that become CSS variables: one
drawing serves the light and the dark theme. Every word that comes from a caption, a configuration or a file
name goes through `html.escape`.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
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

from megasora.config import Config, read_yaml
from megasora.errors import MegaSoraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ATTRIBUTES = ("color", "direction", "shape", "background")  # what the detector reads back
PARTS = ("data", "forward", "backward", "optimizer")  # of a step's time, in the order in which they happen
COLUMNS = ["loss", "grad_norm", "rate", "tokens_per_second", "padding", "mfu", "memory_gib"]
COLUMNS += ["time_step", *(f"time_{part}" for part in PARTS)]
MEDIA = {".mp4": "video/mp4", ".png": "image/png"}

MAX_EVALUATED, MAX_OTHERS = 64, 16  # samples embedded
MAX_EMBEDDED = 10 << 20  # bytes of videos and images; base64 makes four thirds of it
SMALL = 256  # px; pictures up to this side are scaled up with their pixels kept square
NBSP, DASH = "\N{NO-BREAK SPACE}", "\N{EN DASH}"


def write_report(run_dir: Path) -> Path:
    """Write report.html and report.json into a run folder; returns the path of the page.

    Raises MegaSoraError where the folder, config.yaml or a step in metrics.jsonl is missing, and where a JSON
    file is not what MegaSora writes.
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
    """At most `most` points of a curve: the lowest and highest of each stretch, so that no spike is lost."""
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


def compact(value: float, digits: int = 3) -> str:
    """1234567 -> 1.23M, 12000 -> 12k, 0.00012 -> 1.2e-4."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.{digits}g}{letter}"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.{digits}g}"


def chart(title: str, about: str, legend: Iterable[tuple[str, str]], draw: Callable[[Axes], None]) -> str:
    """A figure of the page: title, a line about it, a legend of (CSS colour, text), and what `draw` draws.

    All words but those at the axes are HTML, so that they stay legible where the chart is scaled down.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    width, height, left, right, top, bottom = 420, 224, 42, 10, 6, 34  # units of the SVG, about px
    box = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10}):
        figure = Figure(figsize=(width / 72, height / 72))
        FigureCanvasSVG(figure)
        axes = figure.add_axes(box)
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        axes.margins(x=0.02)
        draw(axes)
        first, last = axes.get_xlim()
        if last - first < 1:  # a run of one step
            axes.set_xlim(first - 0.5, last + 0.5)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(paint("line"))
        axes.grid(axis="y", color=paint("line"), linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", length=0, colors=paint("muted"), pad=5)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10), integer=True))
        if axes.get_yscale() == "linear":
            axes.yaxis.set_major_locator(MaxNLocator(5))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: compact(value, 4)))
        axes.set_xlabel("step", color=paint("muted"), labelpad=2)
        sink = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(sink, format="svg", metadata=nothing)

    svg = sink.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*>", f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">', svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    svg = re.sub(r"font(-[a-z]+)?: [^;\"]*;? ?", "", svg)  # the page's font; see .plot text in report.html
    svg = re.sub(r' d="[^"]*"', lambda d: re.sub(r"(\.\d\d)\d+", r"\1", d[0]), svg)
    svg = re.sub(r"#fe00([0-9a-f]{2})", lambda m: f"var(--{PAINTS[int(m[1], 16)]})", svg)
    svg = re.sub(r"#fd([0-9a-f]{2})([0-9a-f]{2})", lambda m: ramp(int(m[1], 16), int(m[2], 16)), svg)
    keys = "".join(f'<li><i style="background:{color}"></i>{escape(text)}</li>' for color, text in legend)
    return (
        f'<figure class="card chart"><figcaption><h3>{escape(title)}</h3><p>{escape(about)}</p>'
        f'<ul class="legend">{keys}</ul></figcaption>'
        f'<div class="plot" role="img" aria-label="{escape(title)}: {escape(about)}">{svg}</div></figure>'
    )


def set_range(axes: Axes, noisy: np.ndarray, whole: Iterable[np.ndarray] = (), zero: bool = False) -> None:
    """Show the middle 99 % of `noisy` and all of `whole`; from `zero`, or logarithmic over a factor of 20."""
    noisy = noisy[np.isfinite(noisy)]
    ends = [np.quantile(noisy, (0.005, 0.995)) if len(noisy) else noisy, *whole]
    values = np.concatenate(ends)
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, high = (0.0 if zero else values.min()), values.max()
    if low > 0 and high > 20 * low:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(lambda *_: "")
        axes.set_ylim(low / 1.2, high * 1.2)
    else:
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low if zero else low - margin, high + margin)


def window_of(values: np.ndarray) -> int:
    """Steps of the running mean: a fortieth of the run, odd."""
    return max(1, len(values) // 40) | 1


def tell_window(values: np.ndarray) -> str:
    window = window_of(values)
    return f"mean of {window} steps" if window > 1 else "every step"


def draw_noisy(axes: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    """One number a step: every step, faint, and the running mean."""
    axes.plot(*thin(steps, values), color=paint("accent"), linewidth=0.7, alpha=0.3)
    draw_points(axes, *thin(steps, smooth(values, window_of(values))), paint("accent"))


def noisy_chart(title: str, about: str, label: str, run: Run, values: np.ndarray, zero: bool = True) -> str:
    """`values` over the steps, no chart where there are none; `zero`: the axis starts there."""
    if not np.isfinite(values).any():
        return ""

    def draw(axes: Axes) -> None:
        draw_noisy(axes, run.steps, values)
        set_range(axes, values, [smooth(values, window_of(values))], zero)

    return chart(title, about, [("var(--accent)", f"{label}, {tell_window(values)}")], draw)


def draw_points(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str) -> None:
    """A line, with a mark at each value as long as the marks do not touch."""
    marker = "o" if len(steps) <= 40 else ""
    axes.plot(steps, values, color=color, linewidth=1.7, marker=marker, markersize=3.5)


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


def spell(attribute: str) -> str:
    return {"color": "colour"}.get(attribute, attribute)


def section(anchor: str, title: str, body: str, about: str = "") -> str:
    """`about` and `body` are HTML."""
    lead = f'<p class="lead">{about}</p>' if about else ""
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{lead}{body}</section>'


def show_facts(run: Run) -> str:
    """Where and with what the run was made, under the title."""
    facts = run.facts
    parts = [run.folder, *(facts[key] for key in ("created", "host", "machine", "device") if facts.get(key))]
    if facts.get("world_size"):
        parts.append(plural(int(facts["world_size"]), "process"))
    parts += [f"{key} {facts[key]}" for key in ("megasora", "torch") if facts.get(key)]
    memory = run.metrics["memory_gib"]
    if np.isfinite(memory).any():
        parts.append(f"{np.nanmax(memory):.1f}{NBSP}GiB at most in the first process")
    return "".join(f"<li>{escape(part)}</li>" for part in parts)


def show_figures(run: Run, figures: dict[str, Any]) -> str:
    """The headline figures: a row of the run's, and a row of accuracies, each against chance."""

    def tile(label: str, value: str, about: str, meter: str = "") -> str:
        head = f'<div class="card tile"><h3>{escape(label)}</h3><strong>{value}</strong>'
        return f"{head}{meter}<p>{escape(about)}</p></div>"

    first, last = figures["first_val_loss"], figures["final_val_loss"]
    if first and last is not None:
        change = f"{100 * (last / first - 1):+.0f}{NBSP}%".replace("-", "\N{MINUS SIGN}")
        about = f"at step {run.validation[0]['step']:,} and {run.validation[-1]['step']:,}, {change}"
        tiles = [tile("Validation loss", f"<small>{first:.3f} →</small> {last:.3f}", about)]
    else:
        loss = smooth(run.metrics["loss"], window_of(run.steps))[-1]
        tiles = [tile("Training loss", f"{loss:.3f}", "mean of the last steps; not validated yet")]
    planned, steps = run.config.get("run.steps"), figures["steps"]
    about = f"{duration(float(np.nansum(run.metrics['time_step'])))} of training"
    if planned not in (None, steps):
        about = f"of {planned:,}; {about}"
    tiles.append(tile("Steps", f"{steps:,}", about))
    if figures["tokens_per_second"] is not None:
        mfu = run.metrics["mfu"][np.isfinite(run.metrics["mfu"])]
        about = "median, all processes" + (f"; MFU {percent(np.median(mfu), 1)}" if len(mfu) else "")
        tiles.append(tile("Tokens per second", compact(figures["tokens_per_second"]), about))
    if figures["padding_fraction"] is not None:
        tiles.append(tile("Padding", percent(figures["padding_fraction"], 2), "of the tokens in all packs"))
    if run.facts.get("parameters"):
        count = int(run.facts["parameters"])
        tiles.append(tile("Parameters", compact(count), f"{count:,}"))

    meters = []
    for attribute in ATTRIBUTES:
        accuracy, held_out = figures[f"{attribute}_accuracy"], figures[f"held_out_{attribute}_accuracy"]
        if accuracy is None:
            continue
        words = {sample.expected[attribute] for sample in run.evaluated if attribute in sample.expected}
        about, bar = [], f'<i style="width:{100 * accuracy:.1f}%"></i>'
        if words:
            about.append(f"chance {percent(1 / len(words))}")
            bar += f'<b style="left:{100 / len(words):.1f}%"></b>'
        if held_out is not None:
            about.append(f"held out {percent(held_out)}")
        label = f"{spell(attribute)} right".capitalize()
        meters.append(tile(label, percent(accuracy), ", ".join(about), f'<div class="meter">{bar}</div>'))
    return "".join(f'<div class="figures">{"".join(row)}</div>' for row in (tiles, meters) if row)


def show_samples(run: Run) -> str:
    """The evaluated prompts with what was read from their videos, then the other samples."""
    left = MAX_EMBEDDED

    def grid(samples: list[Sample], kind: str) -> str:
        nonlocal left
        tiles = []
        for sample in samples:
            size = sample.file.stat().st_size if sample.file.is_file() else None
            if size is None:
                run.notes.append(f"samples/{sample.file.name} is named by evaluation.json and is not there.")
            elif size > left:
                run.notes.append(
                    f"{sample.file.name} ({size / 2**20:.1f} MiB) was left out: "
                    f"the page embeds {MAX_EMBEDDED >> 20} MiB of samples."
                )
                size = None
            left -= size or 0
            tiles.append(show_sample(sample, size is not None))
        return f'<div class="{kind}">{"".join(tiles)}</div>'

    page = ""
    if run.evaluated:
        tables = "".join(confusion(run.evaluated, attribute) for attribute in ATTRIBUTES)
        controls = (
            '<div class="controls"><label><input type="checkbox" id="misses"> only videos with a miss</label>'
            '<button type="button" id="pause" hidden>pause</button></div>'
        )
        shown = grid(run.evaluated[:MAX_EVALUATED], "samples")
        body = f'<div class="tables">{tables}</div>{controls}{shown}'
        page += section("samples", "Prompts, read back", body, escape(tell_evaluation(run)))
    if run.others:
        title = "More samples" if run.evaluated else "Samples"
        page += section("more-samples", title, grid(run.others, "samples large"))
    return page


def tell_evaluation(run: Run) -> str:
    e, told = run.evaluation, [plural(len(run.evaluated), "prompt")]
    if e.get("size"):
        told.append(f"{e['size']}{NBSP}px")
    if e.get("frames"):
        told.append(plural(int(e["frames"]), "frame"))
    if e.get("steps"):
        told.append(f"{plural(int(e['steps']), 'step')} of {e.get('solver', 'the sampler')}")
    if e.get("guidance") is not None:
        told.append(f"guidance {e['guidance']:g}")
    if e.get("step") is not None:
        told.append(f"weights of training step {e['step']:,}")
    if e.get("seconds"):
        told.append(f"sampled in {duration(float(e['seconds']))}")
    held = sum(sample.held_out for sample in run.evaluated)
    return (
        f"A detector reads from each video what it shows: {', '.join(told)}. "
        + (f"{plural(held, 'prompt')} held out: training never saw the combination. " if held else "")
        + "In the tables, rows were asked for and columns were read."
    )


def show_sample(sample: Sample, embed: bool) -> str:
    style = f' style="aspect-ratio:{sample.size[1]}/{sample.size[0]}"' if sample.size else ""
    if sample.size is None or max(sample.size) <= SMALL:
        style += ' class="pixels"'
    if embed:
        text = base64.b64encode(sample.file.read_bytes()).decode("ascii")
        source = f'src="data:{MEDIA[sample.file.suffix]};base64,{text}"'
        if sample.file.suffix == ".mp4":
            picture = f"<video{style} autoplay loop muted playsinline {source}></video>"
        else:
            picture = f'<img{style} alt="{escape(sample.prompt)}" {source}>'
    else:
        picture = f'<div class="absent">{escape(sample.file.name)} is not on this page</div>'
    if sample.held_out:
        picture += '<span class="held" title="training never saw this combination">held out</span>'

    about, marks = escape(sample.prompt), ""
    if sample.details:
        about += f"<p>{escape(sample.details)}</p>"
    for attribute in ("color", "shape", "direction"):
        asked, read = sample.expected.get(attribute), sample.read.get(attribute)
        if asked is None:
            continue
        tip = escape(f"{spell(attribute)}: asked {asked}, read {read or 'nothing'}")
        if read == asked:
            marks += f'<li class="right" title="{tip}">✓{NBSP}{escape(asked)}</li>'
        else:
            saw = f"<s>{escape(asked)}</s>{NBSP}{escape(read or '?')}"
            marks += f'<li class="wrong" title="{tip}">✗{NBSP}{saw}</li>'
    if marks:
        about += f'<ul class="marks">{marks}</ul>'
    kind = "sample perfect" if sample.read == sample.expected else "sample"
    caption = f"<figcaption>{about}</figcaption>"
    return f'<figure class="{kind}"><div class="picture">{picture}</div>{caption}</figure>'


def confusion(samples: list[Sample], attribute: str) -> str:
    """Table of what was asked (rows) and what was read (columns), in videos."""
    pairs = [(s.expected[attribute], s.read[attribute]) for s in samples if attribute in s.expected]
    asked = list(dict.fromkeys(want for want, _ in pairs))
    if len(asked) < 2:
        return ""
    read = [*asked, *sorted({got for _, got in pairs if got} - set(asked))]
    if any(not got for _, got in pairs):
        read.append(None)
    head = "".join(f'<th scope="col">{escape(word or "none")}</th>' for word in read)
    rows = ""
    for want in asked:
        counts = [pairs.count((want, got)) for got in read]
        rows += f'<tr><th scope="row">{escape(want)}</th>'
        for got, count in zip(read, counts, strict=True):
            kind, share = "hit" if got == want else "miss", 100 * count / sum(counts)
            rows += f'<td class="{kind}" style="--share:{share:.0f}%">{count or "·"}</td>'
        rows += "</tr>"
    caption = f"<caption>{escape(spell(attribute).capitalize())}</caption>"
    table = f"{caption}<thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody>"
    return f'<div class="card"><table class="confusion">{table}</table></div>'


def show_loss(run: Run) -> str:
    loss = run.metrics["loss"]
    steps = np.array([record["step"] for record in run.validation])
    validation = np.array([number(record.get("loss")) for record in run.validation])

    def draw_loss(axes: Axes) -> None:
        draw_noisy(axes, run.steps, loss)
        draw_points(axes, steps, validation, paint("second"))
        set_range(axes, loss, [smooth(loss, window_of(loss)), validation])

    legend = [("var(--accent)", f"training, {tell_window(loss)}")]
    if len(steps):
        legend.append(("var(--second)", f"validation, {plural(len(steps), 'time')}"))
    about = "Mean squared error of the predicted velocity. Faint: every step."
    charts = chart("Training and validation loss", about, legend, draw_loss)

    bins = [{(b["low"], b["high"]): number(b["loss"]) for b in r.get("bins") or []} for r in run.validation]
    edges = sorted(set().union(*bins))
    curves = [np.array([losses.get(edge, math.nan) for losses in bins]) for edge in edges]

    def draw_bins(axes: Axes) -> None:
        for place, curve in enumerate(curves):
            draw_points(axes, steps, curve, ramp_paint(place, len(curves)))
        set_range(axes, np.array([]), curves)

    if edges:
        legend = [
            (ramp(place, len(edges)), f"{low:.2g}{DASH}{high:.2g}: {curves[place][-1]:.3f}")
            for place, (low, high) in enumerate(edges)
        ]
        about = "Fixed clips and noise; t = 0 is clean, t = 1 is noise. With the last loss of each bin."
        charts += chart("Validation loss by timestep", about, legend, draw_bins)
    return section("loss", "Loss", f'<div class="charts">{charts}</div>')


def show_speed(run: Run) -> str:
    m = run.metrics
    about = "Tokens of clips, padding not counted, all processes together. Faint: every step."
    charts = noisy_chart("Throughput", about, "tokens per second", run, m["tokens_per_second"])

    names, times = list(PARTS), np.nan_to_num([m[f"time_{part}"] for part in PARTS])
    rest = np.nan_to_num(m["time_step"]) - times.sum(axis=0)
    if rest.sum() > 0.01 * np.nansum(m["time_step"]):
        names, times = [*names, "other"], np.vstack((times, np.maximum(rest, 0)))
    stretches = np.array_split(np.arange(len(run.steps)), min(len(run.steps), 160))
    x = [run.steps[stretch].mean() for stretch in stretches]
    stacked = 1e3 * np.array([[part[stretch].mean() for stretch in stretches] for part in times])

    def draw_times(axes: Axes) -> None:
        axes.stackplot(x, stacked, colors=[paint(name) for name in names], linewidth=0)
        set_range(axes, stacked.sum(axis=0), zero=True)

    shares = times.sum(axis=1) / max(times.sum(), 1e-12)
    legend = [(f"var(--{n})", f"{n} {percent(share)}") for n, share in zip(names, shares, strict=True)]
    mean = 1e3 * times.sum() / len(run.steps)
    about = f"Milliseconds; {mean:.3g} ms on average. With the share of each part."
    charts += chart("Time of a step", about, legend, draw_times)
    about = "Model FLOPs utilisation: the share of the GPUs' peak that the model's own FLOPs are, in %."
    charts += noisy_chart("MFU", about, "MFU", run, 100 * m["mfu"])
    return section("speed", "Speed", f'<div class="charts">{charts}</div>')


def show_optimizer(run: Run) -> str:
    m, c = run.metrics, run.config
    norms, clip = m["grad_norm"], number(c.get("optim.clip"))
    about = "Global norm before clipping."
    if math.isfinite(clip) and np.isfinite(norms).any():
        above = np.mean(norms[np.isfinite(norms)] > clip)
        about += f" Above optim.clip = {clip:g} in {percent(above)} of the steps."
    charts = noisy_chart("Gradient norm", about, "gradient norm", run, norms, zero=False)

    def draw_rate(axes: Axes) -> None:
        draw_points(axes, *thin(run.steps, m["rate"]), paint("accent"))
        set_range(axes, m["rate"], zero=True)

    warmup, final = c.get("optim.warmup"), c.get("optim.final_rate")
    about = f"Warm-up of {warmup} steps, then a cosine down to {final} of optim.rate."
    charts += chart("Learning rate", about, [("var(--accent)", "rate")], draw_rate)
    about = "Share of the tokens in the packs, in %."
    charts += noisy_chart("Padding", about, "padding", run, 100 * m["padding"])
    return section("optimizer", "Optimizer and packs", f'<div class="charts three">{charts}</div>')


def show_config(run: Run) -> str:
    """What differs from the defaults, and the whole resolved configuration."""

    def written(value: Any) -> str:
        return escape(value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False))

    defaults = flatten(dataclasses.asdict(Config()))
    place = {key: at for at, key in enumerate(defaults)}
    rows, sections = [], {}
    for key in sorted(run.config, key=lambda key: place.get(key, len(place))):
        value, default = run.config[key], defaults.get(key)
        changed = key not in defaults or value != default
        if changed:
            was = written(default) if key in defaults else "not a key of this version"
            rows.append(f'<tr><th scope="row">{escape(key)}</th><td>{written(value)}</td><td>{was}</td></tr>')
        name, _, rest = key.partition(".")
        kind = ' class="changed"' if changed else ""
        line = f"<div{kind}><dt>{escape(rest)}</dt><dd>{written(value)}</dd></div>"
        sections[name] = sections.get(name, "") + line
    head = '<tr><th scope="col">key</th><th scope="col">this run</th><th scope="col">default</th></tr>'
    body = f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody>"
    table = f'<div class="card"><table class="settings">{body}</table></div>' if rows else ""
    lists = ""
    for name, lines in sections.items():
        lists += f'<div class="settings-of"><h3>{escape(name)}</h3><dl>{lines}</dl></div>'
    summary = f"<summary>all {len(run.config)} settings, the changed ones marked</summary>"
    details = f'<details class="card">{summary}<div class="all">{lists}</div></details>'
    about = f"{len(rows)} of {len(run.config)} settings differ from the defaults."
    return section("config", "Configuration", table + details, about)


def show_reproduce(run: Run) -> str:
    folder, processes = str(run.folder), int(run.facts.get("world_size") or 1)
    launched = run.facts.get("command") or []
    command = launched if isinstance(launched, str) else shlex.join(map(str, launched))
    lines = ["# as it was launched", command, ""] if command else []
    lines += [
        "# the same run again, into another folder, from the resolved configuration",
        f"torchrun --nproc-per-node {processes} -m megasora.train {shlex.quote(f'{folder}/config.yaml')} "
        f"run.dir={shlex.quote(f'{folder}-again')}",
        "",
        "# this page",
        f"megasora report {shlex.quote(folder)}",
    ]
    shards, about = run.config.get("data.shards"), ""
    if shards:
        about = f"It reads the shards in <code>{escape(shards)}</code>, made by <code>megasora ingest</code>."
    commands = escape("\n".join(lines))
    return section("reproduce", "How to reproduce it", f'<pre class="card">{commands}</pre>', about)


def show_notes(run: Run) -> str:
    """What was left out or repaired; nothing where there is nothing to say."""
    if not run.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    return section("notes", "Notes", f'<ul class="notes">{items}</ul>')
