"""`megasora COMMAND`: ingest, shards, train, status, sample, web, report, checkpoint, codec, provenance, doctor.

`--help` says what each does.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path

from megasora import __version__
from megasora.commands.argument_types import location, path, whole_number
from megasora.commands.checkpoint_arguments import add_verbs
from megasora.commands.checkpoint_help import CHECKPOINT
from megasora.commands.subcommands import add_command, add_weights_option
from megasora.data.media_formats import CLIP_FILES
from megasora.errors import CONFIGURATION, MegaSoraError, describe
from megasora.sample import add_arguments as add_sample_arguments

INTERRUPTED = 130  # exit code after Ctrl-C, as in shells
OUTPUT_CLOSED = 141  # exit code if standard output was closed, e.g. by `| head`, as in shells


def main(arguments: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not be UTF-8, nor a file name
    try:
        try:
            return run_command(sys.argv[1:] if arguments is None else arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered has no reader
        return OUTPUT_CLOSED
    except (MegaSoraError, OSError) as error:  # OSError, e.g. no space: its message names the file
        print(f"megasora: error: {describe(error)}", file=sys.stderr)
        return CONFIGURATION
    except KeyboardInterrupt:
        print("megasora: stopped", file=sys.stderr)
        return INTERRUPTED


def run_command(arguments: list[str]) -> int:
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if "overrides" in options and all("=" in text and not text.startswith("-") for text in rest):
        options.overrides += rest  # key=value after an option, which argparse assigns to no positional argument
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options.function(options)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megasora", description="Pretraining of video diffusion transformers.")
    parser.add_argument("--version", action="version", version=f"megasora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_ingest(commands)
    add_shards(commands)
    add_train(commands)
    add_status(commands)
    add_sample(commands)
    add_web(commands)
    add_report(commands)
    add_checkpoint(commands)
    add_codec(commands)
    add_provenance(commands)
    add_command(commands, "doctor", doctor, "Names what is slow or missing on this machine, and the remedy.", DOCTOR)
    return parser


def add_ingest(commands) -> None:
    p = add_command(commands, "ingest", ingest, "Converts clips and captions to shards.", INGEST)
    p.add_argument(
        "clips", type=path, metavar="CLIPS",
        help=f"folder of {CLIP_FILES} files, a list of these (.txt, .jsonl), or tars",
    )  # fmt: skip
    p.add_argument(
        "--out", type=path, required=True, metavar="DIR", help="folder to write; new, empty, or of the same ingest"
    )
    p.add_argument("--part", metavar="I/N", help="the I-th of N parts, e.g. 1/8; default: from torchrun or Slurm")
    p.add_argument("--config", type=path, metavar="YAML", help="configuration of the run that the shards are for")
    p.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings, e.g. ingest.missing_caption=skip"
    )


def add_shards(commands) -> None:
    p = add_command(commands, "shards", shards, "Shows what is in a folder of shards.", SHARDS)
    p.add_argument(
        "dir", type=location, metavar="DIR", help="folder, or a URL that fsspec opens, e.g. s3://bucket/shards"
    )
    p = p.add_mutually_exclusive_group()
    p.add_argument("--tokens-per-pack", type=whole_number, metavar="N", help="also print the padding in packs of N")
    p.add_argument("--verify", action="store_true", help="read every byte and name what is damaged; exit code 2 if any")
    p.add_argument("--show", nargs=2, metavar=("ID", "FILE"), help="draw the clip with this sample id into FILE (.png)")


def add_train(commands) -> None:
    p = add_command(commands, "train", train, "Trains or resumes a run in this process.", TRAIN)
    p.add_argument("config", metavar="YAML")
    p.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    p.add_argument("--check", action="store_true", help="only make the checks before a run; prints run.dir")


def add_status(commands) -> None:
    p = add_command(commands, "status", status, "Shows the state of a run.", STATUS)
    p.add_argument("run", type=path, metavar="RUN")
    p.add_argument("--watch", action="store_true", help="refresh until it has ended")


def add_sample(commands) -> None:
    add_sample_arguments(add_command(commands, "sample", sample, "Samples clips from prompts.", SAMPLE))


def add_web(commands) -> None:
    p = add_command(commands, "web", web, "Serves a page to sample clips in a browser on this machine.", WEB)
    p.add_argument("run", type=path, metavar="RUN", help="run folder with a checkpoint")
    p.add_argument("--out", type=path, metavar="DIR", help="folder of the clips; default RUN/web")
    p.add_argument("--port", type=whole_number, default=7860, help="of 127.0.0.1; 0: any free one; default 7860")
    add_weights_option(p)


def add_report(commands) -> None:
    p = add_command(commands, "report", report, "Writes one HTML page about a run.", REPORT)
    p.add_argument("run", type=path, metavar="RUN")
    add_weights_option(p, note="that the evaluation samples with; default ema")


def add_checkpoint(commands) -> None:
    add_verbs(add_command(commands, "checkpoint", None, "Inspects, converts and deletes checkpoints.", CHECKPOINT))


def add_codec(commands) -> None:
    p = add_command(commands, "codec", None, "Evaluates codecs, and encodes and decodes single clips.", CODEC)
    kinds = p.add_subparsers(required=True, metavar="WHAT")
    p = add_command(kinds, "eval", codec_eval, "Measures how well a codec reconstructs clips.", CODEC_EVAL)
    p.add_argument("clips", type=path, metavar="CLIPS", help="as of megasora ingest: a folder, a list, or tars")
    p.add_argument("--out", type=path, required=True, metavar="DIR", help="folder for eval.json and sheet.png")
    p.add_argument("--split", choices=("train", "val", "all"), help="default: val if there is one, else all")
    p.add_argument("--clips", type=whole_number, dest="limit", metavar="N", help="at most N clips, evenly spaced")
    add_codec_options(p)
    p = add_command(kinds, "encode", codec_encode, "Encodes a clip into a file of latents.", CODEC_ENCODE)
    p.add_argument("clip", type=path, metavar="CLIP", help="a video or an image")
    p.add_argument("--out", type=path, required=True, metavar="FILE", help=".safetensors to write; must not exist")
    add_codec_options(p)
    p = add_command(kinds, "decode", codec_decode, "Decodes a file of latents into a clip.", CODEC_DECODE)
    p.add_argument("latents", type=path, metavar="LATENTS", help="file that megasora codec encode wrote")
    p.add_argument("--out", type=path, required=True, metavar="FILE", help=".mp4, or .png for one frame")
    add_codec_options(p)
    p = add_command(kinds, "export", codec_export, "Makes the codec of a codec run's newest checkpoint.", CODEC_EXPORT)
    p.add_argument("run", type=path, metavar="RUN", help="run folder of megasora.train_codec")
    p.add_argument("--out", type=path, metavar="FOLDER", help="a copy of RUN/codec; new, or with an older codec")


def add_provenance(commands) -> None:
    p = add_command(commands, "provenance", provenance, "Says where a file is from.", PROVENANCE)
    p.add_argument("file", type=path, metavar="FILE", help="a video or an image")


def add_codec_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--codec", type=location, required=True, metavar="PATH",
        help="dct, a run of megasora.train_codec, a codec folder, or with codec.name=NAME a pretrained one",
    )  # fmt: skip
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings of codec.* and ingest.*"
    )


INGEST = """\
Reads every clip below CLIPS at its native size and length, never cropped or resized. A caption is NAME.txt, the key
"caption" of NAME.json, or a line {"file": "NAME.mp4", "caption": "..."} of captions.jsonl. Clips below CLIPS/val are
held out for validation. CLIPS may also be a list: .txt, one path per line, or .jsonl, {"file": ..., "caption": ...,
"start": seconds, "end": seconds} per line; or raw WebDataset tars: a .tar, a folder of them, or a quoted pattern.
Writes WebDataset tars, an index per tar, and dataset.json; then prints a table of the clips that were accepted and
rejected, and why. The same command resumes an ingest that was stopped. Several processes share the work under
torchrun, as a Slurm array, or each with its --part; the last one writes dataset.json.

example: megasora ingest data/clips --out data/shards codec.channels=64"""

SHARDS = """\
Reads dataset.json and the indices; prints clips, tokens and sizes of each split and a histogram of tokens per clip.
--verify checks every byte against the checksums, and the counts, and prints a line for each record that is damaged.
--show decodes a clip, writes a contact sheet of it to FILE (.png), and prints its caption and metadata.

example: megasora shards data/shards --tokens-per-pack 4096"""

TRAIN = """\
Reads a configuration, key=value overrides and data.shards; writes the run folder run.dir: config.yaml, metrics.jsonl
(one line per step; times in seconds), validation.jsonl, checkpoints/. The same command resumes from the newest
checkpoint.
On several processes: torchrun --nproc-per-node N -m megasora.train YAML [key=value ...]

example: megasora train configs/demo.yaml run.dir=runs/demo data.shards=data/shards"""

STATUS = """\
Reads the folder RUN; prints state, step, loss, tokens per second, MFU, the last checkpoint, and for each launch when
and where it began and how it ended. Works from any machine that sees the folder; it contacts no process of the run.

example: megasora status runs/demo --watch"""

SAMPLE = """\
Reads the newest checkpoint of RUN, and the images and videos that are given; writes FILE (H.264 mp4, or PNG for one
frame), FILE.sheet.png (a contact sheet) and FILE.json (how it was made). The files are marked as generated, with the
name of the run. Frames of a given video are not sampled again, only encoded with the rest.
--prompts reads a clip a line, {"prompt": "...", "video": "in.mp4", "extend": "2s"}: keys are the options, with _ for -,
and paths are relative to the file. It writes DIR/000000.mp4 and so on, and DIR/results.jsonl.
--script reads a shot a line, {"prompt": "...", "seconds": 2}; each goes on from the last frames of the one before,
unless it has "cut": true. It writes one film.
The same command goes on where it was stopped. Under torchrun: torchrun --nproc-per-node N -m megasora.sample RUN ...

example: megasora sample runs/demo --prompt "a red circle moves right" --out out.mp4 --size 48x80 --frames 17
example: megasora sample runs/demo --prompt "a red circle moves right" --out out.mp4 --video in.mp4 --extend 2s
example: megasora sample runs/demo --prompt "a blue circle moves right" --out out.mp4 --video in.mp4 --edit 0.6
example: megasora sample runs/demo --prompt "a red circle" --out out.mp4 --keyframes a.png:0 b.png:16"""

WEB = """\
Reads the newest checkpoint of RUN; serves http://127.0.0.1:PORT, which only this machine can open, until Ctrl-C. The
clips that are made go to DIR, with the files that `megasora sample` writes. Needs gradio: pip install megasora[web].

example: megasora web runs/demo"""

REPORT = """\
Reads the metrics of RUN; writes RUN/report.html, one page without external links, and RUN/report.json. If the run has
evaluation.prompts, these are first sampled from the newest checkpoint into RUN/samples and evaluated by a detector.

example: megasora report runs/demo"""

CODEC = """\
A codec maps frames to latents and back: dct, the autoencoder of a run of megasora.train_codec, or a pretrained one.

example: megasora codec eval data/clips --codec runs/vae --out runs/vae/eval"""

CODEC_EVAL = """\
Reads every clip below CLIPS at its native size, as megasora ingest does, encodes and decodes it, and compares. Prints a
table; writes DIR/eval.json (PSNR in dB, SSIM, flicker, latent values per pixel value, mean and standard deviation of
each latent channel, frames per CPU second) and DIR/sheet.png (originals, reconstructions and differences x 4). A clip
that cannot be read is named and skipped.

example: megasora codec eval data/clips --codec runs/vae --out runs/vae/eval --clips 20
example: megasora codec eval data/clips --codec dct codec.channels=16 --out eval_dct
example: megasora codec eval data/clips --codec Wan-AI/Wan2.1-T2V-1.3B-Diffusers codec.name=wan --out eval_wan"""

CODEC_ENCODE = """\
Reads CLIP, a video or an image of any size and length; writes its latents, fp32 [C, T, h, w], and what is needed to
decode them. Sides are padded to whole latents.

example: megasora codec encode in.mp4 --codec runs/vae --out z.safetensors"""

CODEC_DECODE = """\
Reads LATENTS and the codec that they were encoded with; writes FILE at the clip's native size (H.264 mp4 of even sides,
or PNG for one frame). The decoder may have been trained further since.

example: megasora codec decode z.safetensors --codec runs/vae --out back.mp4"""

CODEC_EXPORT = """\
Reads the newest checkpoint of RUN and measures mean and standard deviation of the latents; writes RUN/codec, as the end
of a run does. The run may go on.

example: megasora codec export runs/vae"""

PROVENANCE = """\
Reads FILE, its metadata, the sidecar FILE.json and its pixels; prints whether they say that MegaSora made it, by which
run and from which prompt, whether the signature is valid and by whose key, and whether the invisible watermark is
found. The exit code is 0 if something is found and fits, 1 if nothing is found, 2 if the file or its sidecar was
changed, or there is no FILE.

example: megasora provenance out.mp4"""

DOCTOR = """\
Reads versions, devices and free disk; writes nothing.

example: megasora doctor"""


def ingest(options: argparse.Namespace) -> int:
    from megasora.config import load

    config = load(options.config, options.overrides)
    from megasora.codec import resolve_codec
    from megasora.ingest import ingest
    from megasora.ingest.parts import Part

    config.codec = resolve_codec(config.codec)
    part = Part.parse(options.part) if options.part else Part.from_environment(os.environ)
    if ingest(options.clips, options.out, config, part):
        print(f"shards in {options.out}")
    return 0


def shards(options: argparse.Namespace) -> int:
    from megasora.commands.show_clip import show_clip
    from megasora.observe.inspect_shards import describe_shards, verify_shards

    if options.show:
        sample_id, out = options.show
        show_clip(options.dir, sample_id, Path(out))
    elif options.verify:
        return CONFIGURATION if verify_shards(options.dir) else 0
    else:
        describe_shards(options.dir, options.tokens_per_pack)
    return 0


def train(options: argparse.Namespace) -> int:
    from megasora.train import main

    return main([*(["--check"] if options.check else []), options.config, *options.overrides])


def status(options: argparse.Namespace) -> int:
    from megasora.observe.status import show_status

    show_status(options.run, options.watch)
    return 0


def sample(options: argparse.Namespace) -> int:
    from megasora.sample import run

    return run(options)


def web(options: argparse.Namespace) -> int:
    from megasora.web.server import serve

    serve(options.run, options.out, options.port, options.weights)
    return 0


def report(options: argparse.Namespace) -> int:
    from megasora.sampling.evaluation_due import evaluate_if_due

    evaluate_if_due(options.run, options.weights)
    from megasora.observe.report import write_report

    print(f"report in {write_report(options.run)}")
    return 0


def codec_eval(options: argparse.Namespace) -> int:
    from megasora.commands.codec_eval import eval_codec

    eval_codec(options.clips, options.codec, options.out, options.split, options.limit, options.overrides)
    return 0


def codec_encode(options: argparse.Namespace) -> int:
    from megasora.commands.codec import encode_file

    encode_file(options.clip, options.codec, options.out, options.overrides)
    return 0


def codec_decode(options: argparse.Namespace) -> int:
    from megasora.commands.codec import decode_file

    decode_file(options.latents, options.codec, options.out, options.overrides)
    return 0


def codec_export(options: argparse.Namespace) -> int:
    from megasora.commands.codec import export_run
    from megasora.tasks.codec_export import export_codec

    export_run(options.run, options.out, export_codec)
    return 0


def provenance(options: argparse.Namespace) -> int:
    from megasora.commands.provenance import show_provenance

    return show_provenance(options.file)


def doctor(options: argparse.Namespace) -> int:
    from megasora.observe.doctor import run_doctor

    return run_doctor()


if __name__ == "__main__":
    sys.exit(main())
