"""Samples during training on the report page: the sheet of the newest step, and the earlier ones behind a slider."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from megasora.observe.codec_pictures import image
from megasora.observe.codec_run_data import Picture, read_picture
from megasora.observe.formatting import pluralize
from megasora.observe.page_elements import escape, section
from megasora.observe.run_data import RunData, to_float

FOLDER = "train_samples"  # of a run, with a folder for each step
STEP_FOLDER = re.compile(r"step-(\d{8,12})", re.ASCII)
MAX_SHEETS, MAX_EMBEDDED = 24, 10 << 20  # on the page, and their bytes
LEAD = (
    "Fixed prompts, sampled with the EMA weights while the run trained, from the same noise at every step. The clips "
    f"are in <code>{FOLDER}/</code>."
)


def training_samples_section(run: RunData) -> str:
    """HTML; "" for a run without such samples. Adds to `run.notes` what is not on the page."""
    sheets = read_sheets(run.folder / FOLDER, run.notes)
    if not sheets:
        return ""
    losses = {line["step"]: to_float(line.get("loss")) for line in run.validations}
    newest = len(sheets) - 1
    slides = "".join(slide(sheet, losses.get(sheet.step, math.nan), i == newest) for i, sheet in enumerate(sheets))
    controls = ""
    if newest:
        controls = (
            f'<label class="steps" hidden><span>step {sheets[0].step:,}</span><input type="range" id="slide" min="0" '
            f'max="{newest}" value="{newest}" aria-label="step"><span>step {sheets[-1].step:,}</span></label>'
        )
    body = f'<div class="card slides">{slides}{controls}</div>'
    return section("training-samples", "Samples during training", body, LEAD)


def slide(sheet: Picture, loss: float, is_shown: bool) -> str:
    """One sheet, embedded, with its step and the validation loss there."""
    caption = f"<strong>Step {sheet.step:,}</strong>"
    if math.isfinite(loss):
        caption += f"<span>{escape(f'validation loss {loss:.4f}')}</span>"
    hidden, shown = "" if is_shown else " hidden", image(sheet, f"samples after step {sheet.step:,}")
    return f'<figure class="slide"{hidden}><figcaption>{caption}</figcaption>{shown}</figure>'


def read_sheets(folder: Path, notes: list[str]) -> list[Picture]:
    """At most MAX_SHEETS, evenly over the run, with the first and the newest; the newest have precedence in size."""
    found = sorted(
        (int(m[1]), path / "sheet.png") for path in folder.glob("step-*") if (m := STEP_FOLDER.fullmatch(path.name))
    )
    if len(found) > MAX_SHEETS:
        notes.append(f"{FOLDER}/ has samples of {len(found)} steps; those of {MAX_SHEETS} are shown.")
        found = [found[i] for i in np.linspace(0, len(found) - 1, MAX_SHEETS).round().astype(int)]
    sheets, remaining = [], MAX_EMBEDDED
    for step, path in reversed(found):
        sheet = read_picture(path, step, remaining)
        if sheet:
            sheets.append(sheet)
            remaining -= len(sheet.data)
    if len(sheets) < len(found):
        notes.append(
            f"{FOLDER}/: {pluralize(len(found) - len(sheets), 'sheet')} left out: not a PNG, or more than the "
            f"{MAX_EMBEDDED >> 20} MiB that the page embeds."
        )
    return sheets[::-1]
