"""`megasora sample RUN ...`, and `python -m megasora.sample RUN ...`, also under torchrun: samples clips from prompts.

one prompt      --prompt ... --out OUT.mp4     (with --image, --video, --connect, --keyframes ...)
many prompts    --prompts FILE --out DIR
shots           --script FILE --out OUT.mp4
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megasora.commands.argument_types import number, path, whole_number
from megasora.commands.subcommands import add_weights_option
from megasora.errors import CONFIGURATION, DONE, MegaSoraError, describe
from megasora.parallel.launcher import process_rank, read_launcher

if TYPE_CHECKING:
    from megasora.config import Config
    from megasora.sampling.denoiser import Denoiser
    from megasora.sampling.run_to_sample import RunToSample
    from megasora.sampling.session import Session

INTERRUPTED = 130  # exit code after Ctrl-C, as in shells
MAIN_PRINTS_SECONDS = 5.0  # within which the first process has printed its error

REQUEST = (  # the flags that say what a clip is
    "prompt", "negative_prompt", "image", "last_image", "video", "extend", "prepend", "loop", "edit", "mask", "connect",
    "keyframes", "size", "frames", "fps", "seed",
)  # fmt: skip
OF_ALL = ("negative_prompt", "size", "frames", "fps", "seed")  # that hold for all rows of --prompts and --script


def add_arguments(parser: argparse.ArgumentParser) -> None:
    p = parser
    p.add_argument("run", type=path, metavar="RUN", help="run folder with a checkpoint")
    p.add_argument(
        "--out", type=path, required=True, metavar="FILE", help=".mp4, or .png for one frame; with --prompts a folder"
    )
    p = parser.add_argument_group("what is sampled")
    p.add_argument("--prompt", metavar="TEXT", help="what the clip shows")
    p.add_argument(
        "--negative-prompt", metavar="TEXT",
        help="what guidance moves away from; default: the null token, or sample.negative_prompt of the run",
    )  # fmt: skip
    p.add_argument("--prompts", type=path, metavar="FILE", help=".jsonl, a clip a line, or .txt, a prompt a line")
    p.add_argument("--script", type=path, metavar="FILE", help=".jsonl, a shot a line: one film")
    p = parser.add_argument_group("what is given")
    p.add_argument("--image", type=path, metavar="FILE", help="the first frame; it also sets the size")
    p.add_argument("--last-image", type=path, metavar="FILE", help="the last frame")
    p.add_argument(
        "--keyframes", nargs="+", metavar="FILE:FRAME",
        help="images and which frames they are, counted from 0: a.png:0 b.png:16",
    )  # fmt: skip
    p.add_argument("--video", type=path, metavar="FILE", help="a video, for one of the next four")
    p.add_argument("--extend", metavar="N|Ns", help="adds N frames, or seconds, after it")
    p.add_argument("--prepend", metavar="N|Ns", help="adds them before it")
    p.add_argument("--loop", action="store_true", default=None, help="adds --frames that lead back to its start")
    p.add_argument(
        "--edit", type=number, metavar="STRENGTH", help="samples it anew: 0.3 keeps much of it, 1 keeps nothing"
    )
    p.add_argument("--mask", type=path, metavar="FILE", help="of --edit: image or video, white where pixels may change")
    p.add_argument(
        "--connect", nargs=2, type=path, metavar=("A", "B"), help="video A, --frames that lead to B, and video B"
    )
    p = parser.add_argument_group("size and length")
    p.add_argument("--size", metavar="HxW", help="pixels; default: of the given files, or sample.size of the run")
    p.add_argument("--frames", type=whole_number, help="number of frames; 1 makes an image; default sample.frames")
    p.add_argument("--fps", type=number, help="frames per second; default: of the given video, or sample.fps")
    p = parser.add_argument_group("how it is sampled")
    p.add_argument("--seed", type=whole_number, help="default 0; a line of --prompts or --script adds its number")
    p.add_argument(
        "--guidance-scale", type=number,
        help="1: none; higher follows the prompt more closely; default sample.guidance_scale",
    )  # fmt: skip
    p.add_argument("--num-inference-steps", type=whole_number, help="solver steps; default sample.num_inference_steps")
    p.add_argument("--solver", choices=("euler", "heun", "dpmpp_2m", "unipc"))
    add_weights_option(p)
    p.add_argument("--keep-latents", action="store_true", help="keep the latents, in the folder .FILE.work")
    p.add_argument("--part", metavar="I/N", help="of --prompts: the I-th of N parts; default: from Slurm's job array")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value",
        help="settings, e.g. sample.window_frames=33; under torchrun also parallel.*",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Runs the command of these options; the exit code. Raises MegaSoraError and OSError."""
    settings = [word for word in options.keyframes or () if word.startswith(("sample.", "parallel.")) and "=" in word]
    if settings:  # argparse takes all words after --keyframes for its own
        options.keyframes = [word for word in options.keyframes if word not in settings]
        options.overrides = [*options.overrides, *settings]
    modes = [name for name in ("prompt", "prompts", "script") if getattr(options, name) is not None]
    if len(modes) != 1:
        raise MegaSoraError("give one of --prompt, --prompts and --script" + (f", not {len(modes)}" if modes else ""))
    if modes == ["prompt"]:
        return sample_one(options)
    others = [name for name in REQUEST if name not in OF_ALL and getattr(options, name) is not None]
    if others:
        name = others[0].replace("_", "-")
        raise MegaSoraError(
            f"--{name} is of one clip; put it into the lines of --{modes[0]} {getattr(options, modes[0])}"
        )
    if modes == ["prompts"]:
        from megasora.sampling.prompt_batch import sample_prompts

        return sample_prompts(options, lambda config: opened_session(options, config))
    from megasora.sampling.script import sample_script

    return sample_script(options, lambda config: opened_session(options, config))


def sample_one(options: argparse.Namespace) -> int:
    from megasora.sampling.clip_plan import ClipPlan
    from megasora.sampling.outputs import beside, check_output, check_output_path
    from megasora.sampling.progress import shown_progress
    from megasora.sampling.requests import Request
    from megasora.sampling.sample_settings import run_settings

    check_output_path(options.out)
    request = Request.from_values({name: getattr(options, name) for name in REQUEST})
    config = run_settings(options.run, options.overrides, vars(options))
    plan = ClipPlan.of(request, config, is_image=options.out.suffix == ".png")
    check_output(options.out, plan)
    with opened_session(options, config) as session:
        from megasora.sampling.session import sample_clip

        session.check_one_group()
        session.check(plan, options.out)
        with shown_progress("sampling", session.is_writer) as progress:
            sample_clip(session, plan, options.out, progress)
        if session.is_writer:
            print(f"{options.out}  (contact sheet: {beside(options.out)[0]})")
    return DONE


@contextmanager
def opened_session(options: argparse.Namespace, config: Config) -> Iterator[Session]:
    """The checkpoint of the run in this process, or on the processes of torchrun."""
    from megasora.sampling.run_to_sample import RunToSample

    launcher = read_launcher(os.environ)
    is_alone = launcher.size == 1  # else all processes would read the whole checkpoint before their parts of it
    opened = RunToSample.open(options.run, options.weights, is_verified=is_alone)
    opened.config.sample, opened.config.codec = config.sample, config.codec
    if not is_alone:
        from megasora.sample_ranks import sampling_config, sampling_ranks

        layout = sampling_config(opened.config, options.overrides)
        with sampling_ranks(layout, launcher, opened.stored_weights) as ranks:
            yield session_of(
                opened, ranks.denoiser, options, is_writer=ranks.is_writer, is_shared=launcher.size > ranks.data_size,
                rank=ranks.world.rank, data_rank=ranks.data_rank, data_size=ranks.data_size, barrier=ranks.barrier,
            )  # fmt: skip
        return
    layout = [text for text in options.overrides if text.startswith("parallel.")]
    if layout:
        raise MegaSoraError(f"{layout[0]} is of several processes; start them with torchrun -m megasora.sample")
    from megasora.sampling.denoiser import LocalDenoiser

    yield session_of(opened, LocalDenoiser(opened.build_model()), options)


def session_of(opened: RunToSample, denoiser: Denoiser, options: argparse.Namespace, **ranks: Any) -> Session:
    """`ranks`: what a session has of the processes that share it."""
    from functools import cache

    from megasora.sampling.prompt_expansion import build_expander
    from megasora.sampling.sampler import Sampler
    from megasora.sampling.session import Session, checkpoint_of, error_of_text

    sampler = Sampler.of(opened, denoiser)
    fits = lambda caption: error_of_text(sampler.encode, caption) is None  # noqa: E731
    expand = cache(build_expander(opened.config, options.run, fits))
    return Session(
        sampler, opened.config.sample, checkpoint_of(opened), expand, keep_latents=options.keep_latents, **ranks
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megasora.sample", description="Samples clips from prompts.")
    add_arguments(parser)
    options, rest = parser.parse_known_args(arguments)
    if not all("=" in text and not text.startswith("-") for text in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides += rest  # key=value after an option
    try:
        return run(options)
    except (MegaSoraError, OSError) as error:
        rank = process_rank()
        if rank > 0:  # the first process prints first: the launcher ends the others as soon as one has exited
            time.sleep(MAIN_PRINTS_SECONDS)
        where = f" (process {rank})" if rank else ""
        print(f"megasora: error: {describe(error)}{where}", file=sys.stderr, flush=True)
        return CONFIGURATION
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
