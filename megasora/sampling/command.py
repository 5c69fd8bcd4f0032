"""The commands `megasora sample`, and the evaluation by `megasora report`."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np

from megasora.checkpoint.store import CheckpointStore
from megasora.config import IngestConfig, SampleConfig, load_run_config, parse_size
from megasora.data.clip_reader import read_clip
from megasora.data.clip_writer import write_image, write_video
from megasora.data.media_formats import IMAGE_FORMATS
from megasora.errors import MegaSoraError
from megasora.files import read_regular_file, write_text_atomic
from megasora.jsonl import parse_json

MAX_RESULT_BYTES = 64 << 20  # of evaluation.json
MIN_FPS, MAX_FPS = 0.1, 1000.0  # well within what the time base of an mp4 can represent


def sample_to_file(options: argparse.Namespace) -> None:
    """Samples one prompt into FILE, with a contact sheet and a JSON file of the settings beside it."""
    check_output_path(options.out)
    image = read_prompt_image(options.image, options.run) if options.image else None

    from rich.console import Console
    from rich.progress import Progress

    from megasora.sampling.generate import num_model_calls
    from megasora.sampling.pipeline import Request, SamplingPipeline, override_sample_config

    pipeline = SamplingPipeline.from_run(options.run, options.weights)
    sample = override_sample_config(
        pipeline.config, guidance_scale=options.guidance_scale, num_inference_steps=options.num_inference_steps,
        solver=options.solver, frames=options.frames, fps=options.fps, size=options.size,
        negative_prompt=options.negative_prompt,
        unconditional=None if options.negative_prompt is None else "negative_prompt",
    )  # fmt: skip
    if options.out.suffix == ".png" and options.frames is None:
        sample.frames = 1
    check_settings(sample, options.out, options.seed)
    height, width = parse_size(sample.size, "--size")
    if image is not None and options.size is None:
        height, width = image.shape[:2]
    sample.size = f"{height}x{width}"
    request = Request(options.prompt, height, width, sample.frames, sample.fps, image)
    pipeline.check(request)
    if sample.frames > 1 and (height % 2 or width % 2):
        raise MegaSoraError(f"--size {sample.size}: an H.264 video has an even height and width")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("sampling", total=num_model_calls(sample))
        video = pipeline([request], sample, options.seed, lambda: progress.advance(bar))[0]
    sheet = write_sample(video, sample, options, pipeline.provenance(options.prompt, options.seed))
    print(f"{options.out}  (contact sheet: {sheet})")


def check_output_path(out: Path) -> None:
    if out.suffix not in (".mp4", ".png"):
        raise MegaSoraError(f"--out {out} must end in .mp4, or .png for one frame")
    if not out.parent.is_dir():
        raise MegaSoraError(f"--out {out}: there is no folder {out.parent}; make it first")
    if out.is_dir():
        raise MegaSoraError(f"--out {out} is a folder; give the name of a file")


def check_settings(sample: SampleConfig, out: Path, seed: int) -> None:
    if (sample.frames == 1) != (out.suffix == ".png"):
        raise MegaSoraError(f"--out {out} with --frames {sample.frames}: an image is .png, a video .mp4")
    steps, scale = sample.num_inference_steps, sample.guidance_scale
    if steps < 1 or not MIN_FPS <= sample.fps <= MAX_FPS or not 0 <= scale < math.inf:
        raise MegaSoraError(
            f"--num-inference-steps {steps} must be at least 1, --fps {sample.fps} from {MIN_FPS} to {MAX_FPS}, "
            f"--guidance-scale {scale} finite and not negative"
        )
    try:
        sample.negative_prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MegaSoraError(f"--negative-prompt is not UTF-8 text: {error}") from None
    if not 0 <= seed < 1 << 63:
        raise MegaSoraError(f"--seed {seed} must be from 0 to below 2^63")


def write_sample(video: np.ndarray, sample: SampleConfig, options: argparse.Namespace, provenance: str) -> Path:
    """Writes `options.out`, its contact sheet and its settings; returns the path of the contact sheet."""
    from megasora.sampling.sheet import contact_sheet

    if sample.frames == 1:
        write_image(video[0], options.out, provenance)
    else:
        write_video(video, sample.fps, options.out, provenance)
    sheet = options.out.with_suffix(".sheet.png")
    write_image(contact_sheet([(options.prompt, video)]), sheet, provenance)
    settings = json.loads(provenance) | {
        "size": sample.size, "frames": sample.frames, "fps": sample.fps, "guidance_scale": sample.guidance_scale,
        "solver": sample.solver, "num_inference_steps": sample.num_inference_steps, "weights": options.weights,
        "unconditional": sample.unconditional, "negative_prompt": sample.negative_prompt,
        "image": str(options.image or ""),
    }  # fmt: skip
    write_text_atomic(options.out.with_suffix(".json"), json.dumps(settings, indent=1) + "\n")
    return sheet


def read_prompt_image(path: Path, run: Path) -> np.ndarray:
    """uint8 [H, W, 3]; raises MegaSoraError if it is not an image or exceeds the ingest limits of the run."""
    if path.suffix.lower() not in IMAGE_FORMATS or not path.is_file():
        raise MegaSoraError(f"--image {path} is not an image file: {', '.join(IMAGE_FORMATS)}")
    limits = load_run_config(run).ingest if (run / "config.yaml").is_file() else IngestConfig()
    return read_clip(path, limits).frames_FHWC[0]


def evaluate_if_due(run: Path) -> None:
    """Samples the run's evaluation prompts, unless this was already done with the newest checkpoint."""
    if not (run / "config.yaml").is_file():
        return
    config = load_run_config(run)
    newest = CheckpointStore(run / "checkpoints").newest()
    if not config.evaluation.prompts or newest is None:
        return
    result = run / "samples" / "evaluation.json"
    if evaluated_checkpoint(result) == newest.name:
        return
    from megasora.sampling.evaluate import evaluate
    from megasora.sampling.pipeline import SamplingPipeline

    evaluate(SamplingPipeline.from_run(run), run / "samples", config.evaluation.prompts, config.run.seed)


def evaluated_checkpoint(result: Path) -> str | None:
    """The name of the checkpoint of evaluation.json; None if there is no such file, or it is damaged."""
    try:
        return f"step-{parse_json(read_regular_file(result, MAX_RESULT_BYTES))['step']:08d}"
    except (OSError, ValueError, TypeError, KeyError):
        return None
