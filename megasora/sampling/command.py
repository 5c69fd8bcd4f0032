"""What `megasora sample` and the evaluation in `megasora report` do with their options."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np

from megasora.checkpoint.store import CheckpointStore
from megasora.config import load, parse_size
from megasora.data.video import IMAGE_FORMATS, read_clip, write_image, write_video
from megasora.errors import MegaSoraError
from megasora.files import write_whole

MIN_FPS, MAX_FPS = 0.1, 1000.0  # what the time base of an mp4 holds with room to spare


def sample_to_file(options: argparse.Namespace) -> None:
    """One prompt to FILE, its contact sheet and its sidecar."""
    out: Path = options.out
    if out.suffix not in (".mp4", ".png"):
        raise MegaSoraError(f"--out {out} must end in .mp4, or .png for one frame")
    if not out.parent.is_dir():
        raise MegaSoraError(f"--out {out}: there is no folder {out.parent}; make it first")
    if out.is_dir():
        raise MegaSoraError(f"--out {out} is a folder; give the name of a file")
    image = read_prompt_image(options.image, options.run) if options.image else None

    from rich.console import Console
    from rich.progress import Progress

    from megasora.sampling.generate import calls_of
    from megasora.sampling.pipeline import Pipeline, Request, sample_settings
    from megasora.sampling.sheet import contact_sheet

    pipeline = Pipeline.from_run(options.run, options.weights)
    sample = sample_settings(
        pipeline.config, guidance=options.guidance, steps=options.steps, solver=options.solver, frames=options.frames,
        fps=options.fps, size=options.size,
    )  # fmt: skip
    if out.suffix == ".png" and options.frames is None:
        sample.frames = 1
    if (sample.frames == 1) != (out.suffix == ".png"):
        raise MegaSoraError(f"--out {out} with --frames {sample.frames}: an image is .png, a video .mp4")
    if sample.steps < 1 or not MIN_FPS <= sample.fps <= MAX_FPS or not 0 <= sample.guidance < math.inf:
        raise MegaSoraError(
            f"--steps {sample.steps} must be at least 1, --fps {sample.fps} from {MIN_FPS} to {MAX_FPS}, "
            f"--guidance {sample.guidance} not negative"
        )
    if not 0 <= options.seed < 1 << 63:
        raise MegaSoraError(f"--seed {options.seed} must be from 0 to below 2^63")
    height, width = parse_size(sample.size, "--size")
    if image is not None and options.size is None:
        height, width = image.shape[:2]
    request = Request(options.prompt, height, width, sample.frames, sample.fps, image)
    pipeline.check(request)
    if sample.frames > 1 and (height % 2 or width % 2):
        raise MegaSoraError(f"--size {height}x{width}: an H.264 video has an even height and width")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("sampling", total=calls_of(sample))
        video = pipeline([request], sample, options.seed, lambda: progress.advance(bar))[0]

    comment = pipeline.provenance(options.prompt, options.seed)
    if sample.frames == 1:
        write_image(video[0], out, comment)
    else:
        write_video(video, sample.fps, out, comment)
    sheet = out.with_suffix(".sheet.png")
    write_image(contact_sheet([(options.prompt, video)]), sheet, comment)
    facts = json.loads(comment) | {
        "size": f"{height}x{width}", "frames": sample.frames, "fps": sample.fps, "guidance": sample.guidance,
        "solver": sample.solver, "steps": sample.steps, "weights": options.weights, "image": str(options.image or ""),
    }  # fmt: skip
    write_whole(out.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    print(f"{out}  (contact sheet: {sheet})")


def read_prompt_image(path: Path, run: Path) -> np.ndarray:
    if path.suffix.lower() not in IMAGE_FORMATS or not path.is_file():
        raise MegaSoraError(f"--image {path} is not an image file: {', '.join(IMAGE_FORMATS)}")
    config = run / "config.yaml"
    limits = load(config if config.is_file() else None).ingest
    return read_clip(path, limits).frames_FHWC[0]


def evaluate_if_due(run: Path) -> None:
    """Samples the run's evaluation prompts, unless that was done for the newest checkpoint already."""
    if not (run / "config.yaml").is_file():
        return
    config = load(run / "config.yaml")
    newest = CheckpointStore(run / "checkpoints").newest()
    if not config.evaluation.prompts or newest is None:
        return
    done = run / "samples" / "evaluation.json"
    if done.is_file() and f"step-{json.loads(done.read_text(encoding='utf-8'))['step']:08d}" == newest.name:
        return
    from megasora.sampling.evaluate import evaluate
    from megasora.sampling.pipeline import Pipeline

    evaluate(Pipeline.from_run(run), run / "samples", config.evaluation.prompts, config.run.seed)
