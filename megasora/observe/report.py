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
import json
import math
import shlex
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from megasora.config import Config
from megasora.files import write_whole
from megasora.observe.charts import (
    chart,
    compact,
    draw_noisy,
    draw_points,
    escape,
    noisy_chart,
    paint,
    ramp,
    ramp_paint,
    set_range,
    smooth,
    tell_window,
    thin,
    window_of,
)  # fmt: skip
from megasora.observe.run_folder import (
    ATTRIBUTES,
    MEDIA,
    NBSP,
    PARTS,
    Run,
    Sample,
    figures_of,
    flatten,
    number,
    plural,
    read_run,
)  # fmt: skip

MAX_EVALUATED, MAX_OTHERS = 64, 16  # samples embedded

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_EMBEDDED = 10 << 20  # bytes of videos and images; base64 makes four thirds of it
SMALL = 256  # px; pictures up to this side are scaled up with their pixels kept square
DASH = "\N{EN DASH}"


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
    write_whole(run.folder / "report.json", json.dumps(figures, indent=2, allow_nan=False) + "\n")
    page_file = run.folder / "report.html"
    write_whole(page_file, page)
    return page_file


# ---------------------------------------------------------------- sections of the page


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}{NBSP}%"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f}{NBSP}s"
    minutes = round(seconds / 60)
    return f"{minutes}{NBSP}min" if minutes < 120 else f"{minutes // 60}{NBSP}h {minutes % 60:02d}{NBSP}min"


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
    axes = [f"{name} {size}" for name, size in facts.get("layout", {}).items() if size > 1]
    if axes:
        parts.append(" × ".join(axes))
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
    folders = run.config.get("data.mixture") or [run.config.get("data.shards")]
    named, about = [f"<code>{escape(folder)}</code>" for folder in folders if folder], ""
    if len(named) > 1:
        named = [f"{name} (weight {w:g})" for name, w in zip(named, run.config["data.weights"], strict=True)]
    if named:
        about = f"It reads the shards in {', '.join(named)}, made by <code>megasora ingest</code>."
    commands = escape("\n".join(lines))
    return section("reproduce", "How to reproduce it", f'<pre class="card">{commands}</pre>', about)


def show_notes(run: Run) -> str:
    """What was left out or repaired; nothing where there is nothing to say."""
    if not run.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    return section("notes", "Notes", f'<ul class="notes">{items}</ul>')
