"""`megasora ingest|shards|train|sample|report|checkpoint|doctor`: what each reads and writes is in its --help."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from megasora import __version__
from megasora.errors import MegaSoraError

EXIT_ERROR = 2


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if "overrides" in options and all("=" in text and not text.startswith("-") for text in rest):
        options.overrides += rest  # key=value behind an option, which argparse gives to no positional argument
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return options.work(options)
    except (MegaSoraError, OSError) as error:  # no space, no permission: the system's words name the file
        print(f"megasora: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("megasora: stopped", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megasora", description="Pretraining of video diffusion transformers.")
    parser.add_argument("--version", action="version", version=f"megasora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, work, summary: str, text: str, group=commands) -> argparse.ArgumentParser:
        formatter = argparse.RawDescriptionHelpFormatter
        sub = group.add_parser(name, help=summary, description=f"{summary}\n\n{text}", formatter_class=formatter)
        sub.set_defaults(work=work)
        return sub

    p = command("ingest", ingest, "Clips and captions to shards.", INGEST)
    p.add_argument(
        "clips", type=Path, metavar="CLIPS", help="folder of .mp4 .mov .mkv .webm .avi .png .jpg .webp files"
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; must not exist or be empty")
    p.add_argument("--config", type=Path, metavar="YAML", help="configuration of the run that the shards are for")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. ingest.missing_caption=skip")

    p = command("shards", shards, "What is in a folder of shards.", SHARDS)
    p.add_argument("dir", type=Path, metavar="DIR")

    p = command("train", train, "Train a run in this process, or go on with it.", TRAIN)
    p.add_argument("config", metavar="YAML")
    p.add_argument("overrides", nargs="*", metavar="key=value")

    p = command("sample", sample, "A prompt to a video.", SAMPLE)
    p.add_argument("run", type=Path, metavar="RUN", help="run folder with a checkpoint")
    p.add_argument("--prompt", required=True, help="what the clip shows")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help=".mp4, or .png for one frame")
    p.add_argument("--image", type=Path, metavar="FILE", help="the first frame; without --size, it gives the size")
    p.add_argument(
        "--size", metavar="HxW", help="pixels, multiples of what a token covers; default sample.size of the run"
    )
    p.add_argument("--frames", type=int, help="number of frames; 1 makes an image; default sample.frames")
    p.add_argument("--fps", type=float, help="frames a second; default sample.fps")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--guidance", type=float, help="1: none; higher follows the prompt more closely; default sample.guidance"
    )
    p.add_argument("--steps", type=int, help="solver steps; default sample.steps")
    p.add_argument("--solver", choices=("euler", "heun"))
    p.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged weights, or the last step's")

    p = command("report", report, "One HTML page on a run.", REPORT)
    p.add_argument("run", type=Path, metavar="RUN")

    p = command("checkpoint", None, "Weights from elsewhere.", CHECKPOINT)
    kinds = p.add_subparsers(required=True, metavar="WHAT")
    p = command("import-wan", import_wan, "Weights of Wan 2.x, to train them further.", IMPORT_WAN, kinds)
    p.add_argument("folder", type=Path, metavar="FOLDER", help="saved by diffusers: config.json and .safetensors files")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help=".safetensors to write; must not exist")

    command("doctor", doctor, "What this machine has, what is slow or missing, and the remedy.", DOCTOR)
    return parser


INGEST = """\
Reads every clip below CLIPS at its native size and length, never cropped or resized. A caption is NAME.txt, the key
"caption" of NAME.json, or a line {"file": "NAME.mp4", "caption": "..."} of captions.jsonl. Clips below CLIPS/val are
held out for validation. Writes WebDataset tars, an index beside each, and dataset.json; then prints a table of what was
taken and what was rejected, and why.

example: megasora ingest data/clips --out data/shards codec.channels=64"""

SHARDS = """\
Reads dataset.json and the indices; prints clips, tokens and sizes of each split and a histogram of tokens a clip.

example: megasora shards data/shards"""

TRAIN = """\
Reads a configuration, key=value overrides and data.shards; writes the run folder run.dir: config.yaml, metrics.jsonl (a
line a step; times in seconds), validation.jsonl, checkpoints/. The same command goes on from the newest checkpoint.
On several processes: torchrun --nproc-per-node N -m megasora.train YAML [key=value ...]

example: megasora train configs/demo.yaml run.dir=runs/demo data.shards=data/shards"""

SAMPLE = """\
Reads the newest checkpoint of RUN; writes FILE (H.264 mp4, or PNG for one frame), FILE.sheet.png (a contact sheet) and
FILE.json (how it was made). The files say that they are generated, and by which run.

example: megasora sample runs/demo --prompt "a red circle moves right" --out out.mp4 --size 48x80 --frames 17"""

REPORT = """\
Reads the metrics of RUN; writes RUN/report.html, one page without external links, and RUN/report.json. If the run has
evaluation.prompts, they are first sampled from the newest checkpoint into RUN/samples and read back by a detector.

example: megasora report runs/demo"""

CHECKPOINT = """\
import-wan reads a model of Wan as diffusers saves it, and writes its weights as MegaSora reads them.

example: megasora checkpoint import-wan Wan2.1-T2V-1.3B-Diffusers --out wan.safetensors"""

IMPORT_WAN = """\
Reads FOLDER/transformer, or FOLDER itself: config.json and the files of weights of a text-to-video model. Writes FILE,
fp32, 4 bytes a weight; then prints the settings of a run that starts from it, for the line of `megasora train`.

example: megasora checkpoint import-wan Wan2.1-T2V-1.3B-Diffusers --out wan.safetensors"""

DOCTOR = """\
Reads versions, devices and free disk; writes nothing.

example: megasora doctor"""


def ingest(options: argparse.Namespace) -> int:
    from megasora.config import load

    config = load(options.config, options.overrides)
    from megasora.ingest import ingest

    ingest(options.clips, options.out, config)
    print(f"shards in {options.out}")
    return 0


def shards(options: argparse.Namespace) -> int:
    from megasora.observe.shards import describe_shards

    describe_shards(options.dir)
    return 0


def train(options: argparse.Namespace) -> int:
    from megasora.train import main

    return main([options.config, *options.overrides])


def sample(options: argparse.Namespace) -> int:
    from megasora.sampling.command import sample_to_file

    sample_to_file(options)
    return 0


def report(options: argparse.Namespace) -> int:
    from megasora.sampling.command import evaluate_if_due

    evaluate_if_due(options.run)
    from megasora.observe.report import write_report

    print(f"report in {write_report(options.run)}")
    return 0


def import_wan(options: argparse.Namespace) -> int:
    from functools import partial

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from megasora.build import patch_dim
    from megasora.checkpoint.wan import import_wan, read_wan
    from megasora.config import load
    from megasora.model.dit import VideoDiT
    from megasora.model.init import initial_value
    from megasora.text.pretrained import FeatureEmbedder

    wan = read_wan(options.folder)
    config = load(None, wan.settings())
    m = config.model
    with torch.device("meta"):  # for its shapes; the text encoder need not be on this machine
        model = VideoDiT(m, patch_dim(config), FeatureEmbedder(wan.text_dim, m.width, m.text_depth, m.heads))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    columns = (TextColumn("import"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("import", total=4 * sum(shape.numel() for shape in shapes.values()))
        first_value = partial(initial_value, seed=config.run.seed)
        import_wan(wan, shapes, first_value, options.out, partial(progress.advance, bar))
    print(f"weights in {options.out}; to train them further, put behind `megasora train YAML`:")
    print(" \\\n".join(shlex.quote(setting) for setting in (*wan.settings(), f"model.weights={options.out}")))
    return 0


def doctor(options: argparse.Namespace) -> int:
    from megasora.observe.doctor import run_doctor

    return run_doctor()


if __name__ == "__main__":
    sys.exit(main())
