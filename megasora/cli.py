"""`megasora ingest|shards|train|status|sample|report|checkpoint|doctor`: its --help says what each reads and writes."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megasora import __version__
from megasora.errors import MegaSoraError

if TYPE_CHECKING:
    import torch

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
        "clips", type=Path, metavar="CLIPS",
        help="folder of .mp4 .mov .mkv .webm .avi .png .jpg .webp files, a list of these (.txt, .jsonl), or tars",
    )  # fmt: skip
    p.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write; new, empty, or of the same ingest"
    )
    p.add_argument("--part", metavar="I/N", help="the I-th of N parts, as 1/8; default: as torchrun or Slurm say")
    p.add_argument("--config", type=Path, metavar="YAML", help="configuration of the run that the shards are for")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. ingest.missing_caption=skip")

    p = command("shards", shards, "What is in a folder of shards.", SHARDS)
    p.add_argument("dir", metavar="DIR", help="folder, or a url that fsspec opens, as s3://bucket/shards")
    p = p.add_mutually_exclusive_group()
    p.add_argument("--budget", type=int, metavar="TOKENS", help="also print the padding in packs of so many tokens")
    p.add_argument("--verify", action="store_true", help="read every byte and name what is damaged; exit code 2 if any")
    p.add_argument("--show", nargs=2, metavar=("ID", "FILE"), help="draw the clip with this sample id into FILE (.png)")

    p = command("train", train, "Train a run in this process, or go on with it.", TRAIN)
    p.add_argument("config", metavar="YAML")
    p.add_argument("overrides", nargs="*", metavar="key=value")

    p = command("status", status, "Where a run is, alive or dead.", STATUS)
    p.add_argument("run", type=Path, metavar="RUN")
    p.add_argument("--watch", action="store_true", help="refresh until it has ended")

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

    p = command("checkpoint", None, "Weights from and for elsewhere.", CHECKPOINT)
    kinds = p.add_subparsers(required=True, metavar="WHAT")
    p = command("import-wan", import_wan, "Weights of Wan 2.x, to train them further.", IMPORT_WAN, kinds)
    p.add_argument("folder", type=Path, metavar="FOLDER", help="saved by diffusers: config.json and .safetensors files")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help=".safetensors to write; must not exist")
    p = command("export", export, "Weights of a run in one file.", EXPORT, kinds)
    p.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN, or one of RUN/checkpoints/step-XXXXXXXX")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help=".safetensors to write; must not exist")
    p.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged weights, or the last step's")

    command("doctor", doctor, "What this machine has, what is slow or missing, and the remedy.", DOCTOR)
    return parser


INGEST = """\
Reads every clip below CLIPS at its native size and length, never cropped or resized. A caption is NAME.txt, the key
"caption" of NAME.json, or a line {"file": "NAME.mp4", "caption": "..."} of captions.jsonl. Clips below CLIPS/val are
held out for validation. CLIPS may also be a list: .txt, a path a line, or .jsonl, {"file": ..., "caption": ...,
"start": seconds, "end": seconds} a line; or raw WebDataset tars: a .tar, a folder of them, or a quoted pattern.
Writes WebDataset tars, an index beside each, and dataset.json; then prints a table of what was taken and what was
rejected, and why. The same command goes on where an earlier one was stopped. Several processes share the work under
torchrun, as a Slurm array, or each with its --part; the last one writes dataset.json.

example: megasora ingest data/clips --out data/shards codec.channels=64"""

SHARDS = """\
Reads dataset.json and the indices; prints clips, tokens and sizes of each split and a histogram of tokens a clip.
--verify holds every byte against its checksum and the counts, and prints a line for each record that is damaged.
--show decodes a clip, writes a contact sheet of it to FILE (.png), and prints its caption and its facts.

example: megasora shards data/shards --budget 4096"""

TRAIN = """\
Reads a configuration, key=value overrides and data.shards; writes the run folder run.dir: config.yaml, metrics.jsonl (a
line a step; times in seconds), validation.jsonl, checkpoints/. The same command goes on from the newest checkpoint.
On several processes: torchrun --nproc-per-node N -m megasora.train YAML [key=value ...]

example: megasora train configs/demo.yaml run.dir=runs/demo data.shards=data/shards"""

STATUS = """\
Reads the folder RUN; prints state, step, loss, tokens a second, MFU, the last checkpoint, and for each launch when and
where it began and how it ended. Works from any machine that sees the folder; nothing is asked of the run itself.

example: megasora status runs/demo --watch"""

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
export reads a checkpoint, whatever layout saved it, and writes its whole weights.

example: megasora checkpoint import-wan Wan2.1-T2V-1.3B-Diffusers --out wan.safetensors"""

IMPORT_WAN = """\
Reads FOLDER/transformer, or FOLDER itself: config.json and the files of weights of a text-to-video model. Writes FILE,
fp32, 4 bytes a weight; then prints the settings of a run that starts from it, for the line of `megasora train`.

example: megasora checkpoint import-wan Wan2.1-T2V-1.3B-Diffusers --out wan.safetensors"""

EXPORT = """\
Reads the newest checkpoint of a run, or the one that is named, after holding it against its checksums. Writes FILE,
fp32, 4 bytes a weight, for other programs, or for model.weights=FILE of another run.

example: megasora checkpoint export runs/demo --out demo.safetensors"""

DOCTOR = """\
Reads versions, devices and free disk; writes nothing.

example: megasora doctor"""


def ingest(options: argparse.Namespace) -> int:
    from megasora.config import load

    config = load(options.config, options.overrides)
    import os

    from megasora.ingest import ingest
    from megasora.ingest.division import Part

    part = Part.parse(options.part) if options.part else Part.of_environment(os.environ)
    if ingest(options.clips, options.out, config, part):
        print(f"shards in {options.out}")
    return 0


def shards(options: argparse.Namespace) -> int:
    from megasora.observe.shards import describe_shards, verify_shards

    if options.show:
        show_clip(options.dir, *options.show)
    elif options.verify:
        return EXIT_ERROR if verify_shards(options.dir) else 0
    else:
        describe_shards(options.dir, options.budget)
    return 0


def show_clip(folder: str, sample_id: str, file: str) -> None:
    import json

    from megasora.data.video import write_image
    from megasora.observe.shards import decode_clip, preview
    from megasora.sampling.sheet import contact_sheet

    out = Path(file)
    if not sample_id.isdecimal() or out.suffix != ".png":
        raise MegaSoraError(f"--show {sample_id} {file}: give a sample id, a whole number, and the name of a .png file")
    if not out.parent.is_dir():
        raise MegaSoraError(f"--show {file}: there is no folder {out.parent}; make it first")
    frames, facts = decode_clip(folder, int(sample_id))
    tiles, zoom = preview(frames)
    title = f"{sample_id}: {facts['caption']}"[:120]
    write_image(contact_sheet([(title, tiles)], len(tiles), zoom), out, comment=json.dumps(facts))
    for key, value in facts.items():
        print(f"{key:>14}  {json.dumps(value, ensure_ascii=False)}")  # in quotes: a caption is no code of a terminal
    print(f"drawn into {out}")


def train(options: argparse.Namespace) -> int:
    from megasora.train import main

    return main([options.config, *options.overrides])


def status(options: argparse.Namespace) -> int:
    from megasora.observe.status import show_status

    show_status(options.run, options.watch)
    return 0


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

    with progress_of("import", shapes) as advance:
        import_wan(wan, shapes, partial(initial_value, seed=config.run.seed), options.out, advance)
    print(f"weights in {options.out}; to train them further, put behind `megasora train YAML`:")
    print(" \\\n".join(shlex.quote(setting) for setting in (*wan.settings(), f"model.weights={options.out}")))
    return 0


def export(options: argparse.Namespace) -> int:
    from megasora.checkpoint.slices import Slices, export
    from megasora.checkpoint.store import find_checkpoint, verify
    from megasora.checkpoint.tensors import check_new_file
    from megasora.sampling.pipeline import WEIGHTS

    check_new_file(options.out)
    checkpoint = find_checkpoint(options.checkpoint)
    verify(checkpoint)
    slices = Slices(checkpoint)
    with progress_of("export", slices.shapes) as advance:
        export(slices, WEIGHTS[options.weights], options.out, advance)
    print(f"{options.weights} weights of {checkpoint} in {options.out}")
    return 0


@contextmanager
def progress_of(what: str, shapes: dict[str, torch.Size]) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; gives what is to be told the bytes of each tensor."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(what, total=4 * sum(shape.numel() for shape in shapes.values()))
        yield lambda size: progress.advance(bar, size)


def doctor(options: argparse.Namespace) -> int:
    from megasora.observe.doctor import run_doctor

    return run_doctor()


if __name__ == "__main__":
    sys.exit(main())
