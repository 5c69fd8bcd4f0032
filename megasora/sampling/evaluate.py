"""How well a run follows captions: balanced prompts on rendered shapes are sampled, and a detector reads them back.

Only meaningful for runs that were trained on `megasora.testing.clips`; `evaluation.prompts` turns it on.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np

from megasora.config import parse_size
from megasora.data.video import write_image, write_video
from megasora.sampling.generate import calls_of
from megasora.sampling.pipeline import Pipeline, Request
from megasora.sampling.sheet import contact_sheet
from megasora.testing.clips import HELD_OUT, evaluation_prompts
from megasora.testing.detector import detect

PROPERTIES = ("color", "direction", "shape", "background")
SHEET_ROWS = 16


def evaluate(pipeline: Pipeline, out: Path, count: int, seed: int = 0) -> dict:
    """Samples `count` prompts into `out` (videos, a contact sheet, evaluation.json) and returns the figures."""
    from rich.console import Console
    from rich.progress import Progress

    start, sample = time.monotonic(), pipeline.config.sample
    height, width = parse_size(sample.size, "sample.size")
    prompts = evaluation_prompts(count)
    requests = [
        Request(text, height, width, sample.frames, sample.fps, number=i) for i, (text, _) in enumerate(prompts)
    ]
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"sampling {count} prompts", total=calls_of(sample))
        videos = pipeline(requests, sample, seed, lambda: progress.advance(bar))

    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    rows = []
    for i, ((text, expected), video) in enumerate(zip(prompts, videos, strict=True)):
        reading = detect(video)
        read = {name: getattr(reading, name) for name in PROPERTIES}
        file = f"{i:03d}.mp4" if len(video) > 1 else f"{i:03d}.png"
        write = write_video if len(video) > 1 else write_still
        write(video, sample.fps, part / file, pipeline.provenance(text, seed))
        held_out = (expected["color"], expected["shape"], expected["direction"]) in HELD_OUT
        rows.append({"prompt": text, "expected": expected, "read": read, "held_out": held_out, "file": file})
    sheet = contact_sheet([(r["prompt"], v) for r, v in zip(rows, videos, strict=True)][:SHEET_ROWS])
    write_image(sheet, part / "sheet.png", pipeline.provenance("contact sheet", seed))
    result = {
        "step": pipeline.step,
        **{f"{p}_accuracy": float(np.mean([r["read"][p] == r["expected"][p] for r in rows])) for p in PROPERTIES},
        "seconds": round(time.monotonic() - start, 1),
        "guidance": sample.guidance, "solver": sample.solver, "steps": sample.steps, "size": sample.size,
        "frames": sample.frames, "seed": seed, "prompts": rows,
    }  # fmt: skip
    (part / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(part, out)
    return result


def write_still(video: np.ndarray, fps: float, path: Path, comment: str) -> None:
    write_image(video[0], path, comment)
