"""`megasora report RUN`: writes RUN/report.html, one page about a run, and RUN/report.json, its figures.

Input: config.yaml, metrics.jsonl, validation.jsonl, run.json, and what each kind of run adds: samples of a VideoDiT
(`report_dit`), reconstructions and statistics of a codec (`report_codec`). Only the first two must exist, so the report
also works while a run trains. Both files are written atomically.

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
from megasora.observe.formatting import NBSP, pluralize
from megasora.observe.page_elements import Page, escape, section
from megasora.observe.report_codec import codec_page
from megasora.observe.report_dit import dit_page
from megasora.observe.run_data import RunData, flatten, read_run_data

PAGES = {"dit": dit_page, "codec": codec_page}  # by `task` of run.json; runs of other tasks get the page of a DiT


def write_report(run_dir: Path) -> Path:
    """Writes report.html and report.json into a run folder; returns the path of the page.

    Raises MegaSoraError if the folder, config.yaml or a step in metrics.jsonl is missing, or a JSON file is invalid.
    """
    run = read_run_data(Path(run_dir))
    page = PAGES.get(run.run_info.get("task"), dit_page)(run)
    text = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8")).substitute(
        name=escape(run.name),
        run_info=run_info_items(run),
        figures=figure_tiles(page.tiles),
        sections="\n".join(filter(None, page.sections)),
        config=config_section(run),
        reproduce=reproduce_section(run, page),
        notes=notes_section(run),
    )
    write_text_atomic(run.folder / "report.json", json.dumps(page.figures, indent=2, allow_nan=False) + "\n")
    page_file = run.folder / "report.html"
    write_text_atomic(page_file, text)
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


def figure_tiles(rows: list[list[str]]) -> str:
    """Rows of headline figures."""
    return "".join(f'<div class="figures">{"".join(row)}</div>' for row in rows if row)


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


def reproduce_section(run: RunData, page: Page) -> str:
    """The commands that repeat the run and write this page, and where its data came from."""
    folder, processes = str(run.folder), int(run.run_info.get("world_size") or 1)
    lines = [
        "# the same run, into another folder, from the resolved configuration",
        f"torchrun --nproc-per-node {processes} -m {page.module} {shlex.quote(f'{folder}/config.yaml')} "
        f"run.dir={shlex.quote(f'{folder}-again')}",
        "",
        "# this page",
        f"megasora report {shlex.quote(folder)}",
    ]
    commands = escape("\n".join(lines))
    return section("reproduce", "How to reproduce it", f'<pre class="card">{commands}</pre>', page.data)


def notes_section(run: RunData) -> str:
    """What was skipped or repeated; "" without notes."""
    if not run.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
    return section("notes", "Notes", f'<ul class="notes">{items}</ul>')
