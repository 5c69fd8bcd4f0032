"""Evaluates how well a run follows captions: samples balanced prompts and reads the clips with a detector.

Only meaningful for runs that were trained on `megasora.testing.clips`; `evaluation.prompts` turns it on.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from megasora.data.clip_writer import write_image, write_video
from megasora.sampling.sampler import Sampler
from megasora.sampling.sheet import contact_sheet
from megasora.testing.clips import HELD_OUT, evaluation_prompts
from megasora.testing.detector import detect

PROPERTIES = ("color", "direction", "shape", "background")
SHEET_ROWS = 16


def evaluate(sampler: Sampler, out: Path, count: int, seed: int = 0, weights: str = "ema") -> dict[str, Any]:
    """Samples `count` prompts into `out` (videos, a contact sheet, evaluation.json); returns what is in the latter.

    `weights`: which ones the sampler has, for evaluation.json.
    """
    start, sample = time.monotonic(), sampler.config.sample
    prompts = evaluation_prompts(count)
    videos = sample_videos(sampler, [text for text, _ in prompts], seed)

    staging = out.with_name(f".{out.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    entries = []
    for i, ((text, expected), video) in enumerate(zip(prompts, videos, strict=True)):
        reading = detect(video)
        detected = {name: getattr(reading, name) for name in PROPERTIES}
        is_video = len(video) > 1
        file, provenance = f"{i:03d}.mp4" if is_video else f"{i:03d}.png", sampler.provenance(text, seed)
        if is_video:
            write_video(video, sample.fps, staging / file, provenance)
        else:
            write_image(video[0], staging / file, provenance)
        held_out = (expected["color"], expected["shape"], expected["direction"]) in HELD_OUT
        entries.append({"prompt": text, "expected": expected, "detected": detected, "held_out": held_out, "file": file})
    sheet = contact_sheet([(entry["prompt"], v) for entry, v in zip(entries, videos, strict=True)][:SHEET_ROWS])
    write_image(sheet, staging / "sheet.png", sampler.provenance("contact sheet", seed))
    correct = {p: [entry["detected"][p] == entry["expected"][p] for entry in entries] for p in PROPERTIES}
    result = {
        "step": sampler.step, "weights": weights,
        **{f"{p}_accuracy": float(np.mean(values)) for p, values in correct.items()},
        "seconds": round(time.monotonic() - start, 1), "guidance_scale": sample.guidance_scale, "solver": sample.solver,
        "num_inference_steps": sample.num_inference_steps, "size": sample.size, "frames": sample.frames, "seed": seed,
        "prompts": entries,
    }  # fmt: skip
    (staging / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(staging, out)
    return result


def sample_videos(sampler: Sampler, prompts: list[str], seed: int) -> list[np.ndarray]:
    """uint8 [F, H, W, 3] of each prompt, with the run's `sample` settings; shows a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    clips = [sampler.timeline(text, seed=seed, sample_id=i) for i, text in enumerate(prompts)]
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"sampling {len(prompts)} prompts", total=1.0)
        stores = sampler.sample(clips, sampler.config.sample, lambda done: progress.update(bar, completed=done))
    return [store.frames_FHWC for store in stores]
