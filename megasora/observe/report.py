"""`megasora report RUN`: writes RUN/report.html, one page about a run, and RUN/report.json, its figures.

Input: config.yaml, metrics.jsonl, validation.jsonl, run.json, samples/evaluation.json with its videos, and samples with
a sidecar NAME.json. Only the first two must exist, so the report also works while a run trains. Both files are written
atomically.

The page has no external links: videos are embedded as base64, so it can be mailed and opened anywhere. Text from
captions, configuration and file names goes through `html.escape`.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from megasora.config import Config
from megasora.files import write_text_atomic
from megasora.observe.curves import smooth, smoothing_window
from megasora.observe.figures import compute_figures
from megasora.observe.formatting import NBSP, compact, format_duration, percent, pluralize
from megasora.observe.page_elements import escape, section, tile
from megasora.observe.report_curves import loss_section, optimizer_section, speed_section
from megasora.observe.report_samples import attribute_title, samples_sections
from megasora.observe.run_data import ATTRIBUTES, RunData, flatten, read_run_data


def write_report(run_dir: Path) -> Path:
    """Writes report.html and report.json into a run folder; returns the path of the page.

    Raises MegaSoraError if the folder, config.yaml or a step in metrics.jsonl is missing, or a JSON file is invalid.
    """
    run = read_run_data(Path(run_dir))
    figures = compute_figures(run)
    page = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8")).substitute(
        name=escape(run.name),
        run_info=run_info_items(run),
        figures=figure_tiles(run, figures),
        loss=loss_section(run),
        samples=samples_sections(run),
        speed=speed_section(run),
        optimizer=optimizer_section(run),
        config=config_section(run),
        reproduce=reproduce_section(run),
        notes=notes_section(run),  # last: the samples may have added some
    )
    write_text_atomic(run.folder / "report.json", json.dumps(figures, indent=2, allow_nan=False) + "\n")
    page_file = run.folder / "report.html"
    write_text_atomic(page_file, page)
    return page_file


def run_info_items(run: RunData) -> str:
    """List items under the title: where and with what the run was made."""
    info = run.run_info
    items = [run.folder, *(info[key] for key in ("created", "machine", "device") if info.get(key))]
    if info.get("world_size"):
        items.append(pluralize(int(info["world_size"]), "process"))
    axes = [f"{name} {size}" for name, size in info.get("layout", {}).items() if size > 1]
    if axes:
        items.append(" × ".join(axes))
    items += [f"{key} {info[key]}" for key in ("megasora", "torch") if info.get(key)]
    memory = run.metrics["peak_memory_gib"]
    if np.isfinite(memory).any():
        items.append(f"{np.nanmax(memory):.1f}{NBSP}GiB at most in the first process")
    return "".join(f"<li>{escape(item)}</li>" for item in items)


def figure_tiles(run: RunData, figures: dict[str, Any]) -> str:
    """Two rows of headline figures: those of training, and accuracies compared with chance."""
    rows = (training_tiles(run, figures), accuracy_tiles(run, figures))
    return "".join(f'<div class="figures">{"".join(row)}</div>' for row in rows if row)


def training_tiles(run: RunData, figures: dict[str, Any]) -> list[str]:
    first, last = figures["first_val_loss"], figures["final_val_loss"]
    if first and last is not None:
        change = f"{100 * (last / first - 1):+.0f}{NBSP}%".replace("-", "\N{MINUS SIGN}")
        description = f"at step {run.validations[0]['step']:,} and {run.validations[-1]['step']:,}, {change}"
        tiles = [tile("Validation loss", f"<small>{first:.3f} →</small> {last:.3f}", description)]
    else:
        loss = smooth(run.metrics["loss"], smoothing_window(run.steps))[-1]
        tiles = [tile("Training loss", f"{loss:.3f}", "mean of the last steps; not validated yet")]
    planned, steps = run.config.get("run.steps"), figures["steps"]
    description = f"{format_duration(float(np.nansum(run.metrics['time_step'])))} of training"
    if planned not in (None, steps):
        description = f"of {planned:,}; {description}"
    tiles.append(tile("Steps", f"{steps:,}", description))
    if figures["tokens_per_second"] is not None:
        mfu = run.metrics["mfu"][np.isfinite(run.metrics["mfu"])]
        description = "median, all processes" + (f"; MFU {percent(np.median(mfu), 1)}" if len(mfu) else "")
        tiles.append(tile("Tokens per second", compact(figures["tokens_per_second"]), description))
    if figures["padding_fraction"] is not None:
        tiles.append(tile("Padding", percent(figures["padding_fraction"], 2), "of the tokens in all packs"))
    if run.run_info.get("parameters"):
        count = int(run.run_info["parameters"])
        tiles.append(tile("Parameters", compact(count), f"{count:,}"))
    return tiles


def accuracy_tiles(run: RunData, figures: dict[str, Any]) -> list[str]:
    """One tile per evaluated attribute; the mark on its bar is chance."""
    tiles = []
    for attribute in ATTRIBUTES:
        accuracy, held_out = figures[f"{attribute}_accuracy"], figures[f"held_out_{attribute}_accuracy"]
        if accuracy is None:
            continue
        words = {sample.expected[attribute] for sample in run.evaluated_samples if attribute in sample.expected}
        details, bar = [], f'<i style="width:{100 * accuracy:.1f}%"></i>'
        if words:
            details.append(f"chance {percent(1 / len(words))}")
            bar += f'<b style="left:{100 / len(words):.1f}%"></b>'
        if held_out is not None:
            details.append(f"held out {percent(held_out)}")
        label = f"{attribute_title(attribute)} right".capitalize()
        tiles.append(tile(label, percent(accuracy), ", ".join(details), f'<div class="meter">{bar}</div>'))
    return tiles


def config_section(run: RunData) -> str:
    """The settings that differ from the defaults, and the whole resolved configuration."""
    defaults = flatten(dataclasses.asdict(Config()))
    order = {key: index for index, key in enumerate(defaults)}
    config = {key: run.config[key] for key in sorted(run.config, key=lambda key: order.get(key, len(order)))}
    changed = [key for key, value in config.items() if key not in defaults or value != defaults[key]]
    body = changed_settings_table(config, changed, defaults) + all_settings(config, changed)
    return section(
        "config", "Configuration", body, f"{len(changed)} of {len(config)} settings differ from the defaults."
    )


def changed_settings_table(config: dict[str, Any], changed: list[str], defaults: dict[str, Any]) -> str:
    if not changed:
        return ""
    rows = ""
    for key in changed:
        default = setting_text(defaults[key]) if key in defaults else "not a key of this version"
        rows += f'<tr><th scope="row">{escape(key)}</th><td>{setting_text(config[key])}</td><td>{default}</td></tr>'
    head = '<tr><th scope="col">key</th><th scope="col">this run</th><th scope="col">default</th></tr>'
    return f'<div class="card"><table class="settings"><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def all_settings(config: dict[str, Any], changed: list[str]) -> str:
    """A collapsed list of all settings, by section of the configuration."""
    lines: dict[str, str] = {}
    for key, value in config.items():
        name, _, rest = key.partition(".")
        css_class = ' class="changed"' if key in changed else ""
        line = f"<div{css_class}><dt>{escape(rest)}</dt><dd>{setting_text(value)}</dd></div>"
        lines[name] = lines.get(name, "") + line
    lists = "".join(
        f'<div class="settings-of"><h3>{escape(name)}</h3><dl>{dl}</dl></div>' for name, dl in lines.items()
    )
    summary = f"<summary>all {len(config)} settings, the changed ones marked</summary>"
    return f'<details class="card">{summary}<div class="all">{lists}</div></details>'


def setting_text(value: Any) -> str:
    return escape(value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False))


def reproduce_section(run: RunData) -> str:
    """The commands that repeat the run and write this page, and where its data came from."""
    folder, processes = str(run.folder), int(run.run_info.get("world_size") or 1)
    lines = [
        "# the same run, into another folder, from the resolved configuration",
        f"torchrun --nproc-per-node {processes} -m megasora.train {shlex.quote(f'{folder}/config.yaml')} "
        f"run.dir={shlex.quote(f'{folder}-again')}",
        "",
        "# this page",
        f"megasora report {shlex.quote(folder)}",
    ]
    commands = escape("\n".join(lines))
    return section("reproduce", "How to reproduce it", f'<pre class="card">{commands}</pre>', describe_data(run))


def describe_data(run: RunData) -> str:
    """HTML: the folders of shards, with their weights in a mixture."""
    folders = run.config.get("data.mixture") or [run.config.get("data.shards")]
    names = [f"<code>{escape(folder)}</code>" for folder in folders if folder]
    if len(names) > 1:
        names = [f"{name} (weight {w:g})" for name, w in zip(names, run.config["data.mixture_weights"], strict=True)]
    return f"It reads the shards in {', '.join(names)}, made by <code>megasora ingest</code>." if names else ""


def notes_section(run: RunData) -> str:
    """What was skipped or repeated; "" without notes."""
    if not run.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    return section("notes", "Notes", f'<ul class="notes">{items}</ul>')
