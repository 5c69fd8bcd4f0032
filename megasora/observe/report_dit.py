"""The report page of a run that trains a VideoDiT: losses by timestep, evaluated prompts and samples, speed, packs."""

from __future__ import annotations

from typing import Any

import numpy as np

from megasora.observe.figures import compute_figures
from megasora.observe.formatting import compact, percent
from megasora.observe.page_elements import Page, escape, tile
from megasora.observe.report_curves import loss_section, optimizer_section, speed_section
from megasora.observe.report_samples import attribute_title, samples_sections
from megasora.observe.report_training_samples import training_samples_section
from megasora.observe.run_data import ATTRIBUTES, RunData
from megasora.observe.run_tiles import loss_tile, parameter_tiles, steps_tile


def dit_page(run: RunData) -> Page:
    figures = compute_figures(run)
    sections = [
        loss_section(run), samples_sections(run), training_samples_section(run), speed_section(run),
        optimizer_section(run),
    ]  # fmt: skip
    tiles = [training_tiles(run, figures), accuracy_tiles(run, figures)]
    return Page(figures, tiles, sections, "megasora.train", describe_data(run))


def training_tiles(run: RunData, figures: dict[str, Any]) -> list[str]:
    tiles = [loss_tile(run, figures), steps_tile(run)]
    if figures["tokens_per_second"] is not None:
        mfu = run.metrics["mfu"][np.isfinite(run.metrics["mfu"])]
        description = "median, all processes" + (f"; MFU {percent(np.median(mfu), 1)}" if len(mfu) else "")
        tiles.append(tile("Tokens per second", compact(figures["tokens_per_second"]), description))
    if figures["padding_fraction"] is not None:
        tiles.append(tile("Padding", percent(figures["padding_fraction"], 2), "of the tokens in all packs"))
    return tiles + parameter_tiles(run)


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


def describe_data(run: RunData) -> str:
    """HTML: the folders of shards, with their weights in a mixture."""
    folders = run.config.get("data.mixture") or [run.config.get("data.shards")]
    names = [f"<code>{escape(folder)}</code>" for folder in folders if folder]
    if len(names) > 1:
        names = [f"{name} (weight {w:g})" for name, w in zip(names, run.config["data.mixture_weights"], strict=True)]
    return f"It reads the shards in {', '.join(names)}, made by <code>megasora ingest</code>." if names else ""
