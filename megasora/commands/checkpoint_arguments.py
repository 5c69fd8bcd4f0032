"""The arguments of `megasora checkpoint VERB`; each verb is a function of a file of its own, which imports torch."""

from __future__ import annotations

import argparse

from megasora.commands.argument_types import number, path, whole_number
from megasora.commands.checkpoint_help import (
    AVERAGE,
    DIFF,
    EXPORT,
    IMPORT_DCP,
    IMPORT_DEEPSPEED,
    IMPORT_WAN,
    INSPECT,
    PRUNE,
    RESHAPE,
    VERIFY,
)
from megasora.commands.subcommands import add_command, add_weights_option
from megasora.errors import CONFIGURATION, MegaSoraError

FORMATS = ("safetensors", "megasora", "diffusers", "dcp", "deepspeed")
ONE = "RUN, for its newest checkpoint, or one of RUN/checkpoints/step-XXXXXXXX"
NEW_RUN = "run folder to write; new or empty"


def add_verbs(parser: argparse.ArgumentParser) -> None:
    """Adds the verbs to the parser of `megasora checkpoint`."""
    verbs = parser.add_subparsers(required=True, metavar="WHAT")
    for add in (
        add_inspect, add_verify, add_diff, add_reshape, add_average, add_prune, add_export, add_import_wan,
        add_import_dcp, add_import_deepspeed,
    ):  # fmt: skip
        add(verbs)


def add_inspect(verbs) -> None:
    p = add_command(verbs, "inspect", inspect, "Prints what is in a checkpoint.", INSPECT)
    p.add_argument("checkpoint", type=path, metavar="CHECKPOINT", help=ONE)
    p.add_argument("--tensors", metavar="PATTERN", help="a row per tensor with such a name, e.g. 'blocks.0.*'")
    add_weights_option(p, "raw")
    p.add_argument("--json", action="store_true", help="print all of it as JSON, with each tensor")


def add_verify(verbs) -> None:
    p = add_command(verbs, "verify", verify, "Verifies the checksums of all checkpoints of a run.", VERIFY)
    p.add_argument("checkpoint", type=path, metavar="CHECKPOINT", help="RUN, or one of RUN/checkpoints/step-XXXXXXXX")
    p.add_argument("--threads", type=whole_number, default=0, metavar="N", help="that read; default: one per core")


def add_diff(verbs) -> None:
    p = add_command(verbs, "diff", diff, "Says which tensors of two checkpoints differ, and by how much.", DIFF)
    for name in ("a", "b"):
        p.add_argument(name, type=path, metavar=name.upper(), help=f"{ONE}, or an exported .safetensors file")
    add_weights_option(p, note="that a file is compared with; default ema")
    p.add_argument("--json", action="store_true", help="print all differences as JSON")


def add_reshape(verbs) -> None:
    p = add_command(verbs, "reshape", reshape, "Writes a checkpoint in another number of files.", RESHAPE)
    p.add_argument("checkpoint", type=path, metavar="CHECKPOINT", help=ONE)
    p.add_argument("--processes", type=whole_number, required=True, metavar="N", help="number of files of fragments")
    p.add_argument("--out", type=path, required=True, metavar="RUN", help=NEW_RUN)


def add_average(verbs) -> None:
    p = add_command(verbs, "average", average, "Averages the weights of several checkpoints.", AVERAGE)
    p.add_argument("checkpoints", type=path, nargs="+", metavar="CHECKPOINT", help=f"{ONE}; of --sigma: one RUN")
    add_weights_option(p, None, "default ema")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--coefficients", type=number, nargs="+", metavar="X", help="a number per checkpoint, sum 1")
    how.add_argument("--sigma", type=number, metavar="S", help="post-hoc EMA of this relative width, e.g. 0.08")
    p.add_argument("--out", type=path, required=True, metavar="RUN", help=NEW_RUN)


def add_prune(verbs) -> None:
    p = add_command(verbs, "prune", prune, "Deletes checkpoints of a run that no rule keeps.", PRUNE)
    p.add_argument("run", type=path, metavar="RUN")
    p.add_argument("--keep", type=whole_number, required=True, metavar="K", help="newest that are kept, at least 1")
    p.add_argument("--keep-every", type=whole_number, default=0, metavar="M", help="keep those at multiples of M steps")
    p.add_argument(
        "--keep-best", type=whole_number, default=0, metavar="N", help="keep the N of lowest validation loss"
    )
    p.add_argument("--dry-run", action="store_true", help="only print what would be deleted")


def add_export(verbs) -> None:
    p = add_command(verbs, "export", export, "Writes a checkpoint for other programs.", EXPORT)
    p.add_argument("checkpoint", type=path, metavar="CHECKPOINT", help=ONE)
    p.add_argument("--format", choices=FORMATS, default="safetensors", help="default safetensors, one file")
    p.add_argument(
        "--out", type=path, required=True, metavar="OUT",
        help="to write, and must not exist: a .safetensors file, of other formats a folder",
    )  # fmt: skip
    add_weights_option(p, None, "default ema, of deepspeed raw")
    p.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights; default fp32")
    p.add_argument("--shard-bytes", type=whole_number, metavar="N", help="megasora, diffusers: of a file, default 5e9")
    p.add_argument(
        "--pipeline", choices=("link", "copy", "none"),
        help="diffusers: the codec and text encoder beside the transformer; default link",
    )  # fmt: skip
    p.add_argument(
        "--everything", action="store_true", default=None, help="dcp: the whole training state, averages and moments"
    )
    p.add_argument("--prefix", metavar="TEXT", help="dcp: of the names of the weights; default 'model.'")
    p.add_argument("--zero-stage", type=whole_number, metavar="S", help="deepspeed: 1, 2 or 3; default 2")
    p.add_argument("--processes", type=whole_number, metavar="N", help="deepspeed: that will load it; default 1")


def add_import_wan(verbs) -> None:
    p = add_command(verbs, "import-wan", import_wan, "Imports Wan 2.x, to train it further or to sample.", IMPORT_WAN)
    p.add_argument(
        "folder", type=path, metavar="FOLDER", help="config.json and .safetensors files, or one file of weights"
    )
    out = p.add_mutually_exclusive_group(required=True)
    out.add_argument("--out", type=path, metavar="FILE", help=".safetensors to write; must not exist")
    out.add_argument("--run", type=path, metavar="RUN", help="run folder to write, for megasora sample; new or empty")
    p.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="of --run: settings, e.g. codec.path=FOLDER/vae"
    )


def add_import_dcp(verbs) -> None:
    summary = "Imports a checkpoint of torch.distributed.checkpoint."
    p = add_command(verbs, "import-dcp", import_dcp, summary, IMPORT_DCP)
    p.add_argument("folder", type=path, metavar="FOLDER", help="with .metadata and .distcp files")
    p.add_argument("--prefix", metavar="TEXT", help="of the names of the weights, e.g. 'model.'; default: found")
    add_run_settings(p)


def add_import_deepspeed(verbs) -> None:
    p = add_command(verbs, "import-deepspeed", import_deepspeed, "Imports a DeepSpeed checkpoint.", IMPORT_DEEPSPEED)
    p.add_argument("folder", type=path, metavar="FOLDER", help="with `latest` and global_stepN")
    p.add_argument("--tag", metavar="NAME", help="e.g. global_step1000; default: what FOLDER/latest names")
    add_run_settings(p)


def add_run_settings(p: argparse.ArgumentParser) -> None:
    p.add_argument("--run", type=path, required=True, metavar="RUN", help=NEW_RUN)
    p.add_argument("--config", type=path, metavar="YAML", help="settings of the run, e.g. config.yaml of another run")
    p.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings, e.g. model.depth=12")


def inspect(options: argparse.Namespace) -> int:
    from megasora.commands.checkpoint_inspect import inspect_checkpoint

    inspect_checkpoint(options.checkpoint, options.weights, options.tensors, options.json)
    return 0


def verify(options: argparse.Namespace) -> int:
    from megasora.commands.checkpoint_verify import verify_checkpoints

    return CONFIGURATION if verify_checkpoints(options.checkpoint, options.threads) else 0


def diff(options: argparse.Namespace) -> int:
    from megasora.commands.checkpoint_diff import diff_checkpoints

    return 1 if diff_checkpoints(options.a, options.b, options.weights, options.json) else 0


def reshape(options: argparse.Namespace) -> int:
    from megasora.commands.checkpoint_reshape import reshape

    reshape(options.checkpoint, options.processes, options.out)
    return 0


def average(options: argparse.Namespace) -> int:
    from megasora.commands.checkpoint_average import average_checkpoints, average_run

    if options.sigma is None:
        average_checkpoints(options.checkpoints, options.weights or "ema", options.coefficients, options.out)
    elif options.weights is not None or options.coefficients is not None:
        raise MegaSoraError(
            "--sigma makes an average of the run's power-function averages; leave --weights and --coefficients out"
        )
    elif len(options.checkpoints) > 1:
        raise MegaSoraError(f"--sigma is of one run, not of {len(options.checkpoints)} checkpoints")
    else:
        average_run(options.checkpoints[0], options.sigma, options.out)
    return 0


def prune(options: argparse.Namespace) -> int:
    from megasora.commands.checkpoint_prune import prune

    prune(options.run, options.keep, options.keep_every, options.keep_best, options.dry_run)
    return 0


def export(options: argparse.Namespace) -> int:
    from megasora.commands.checkpoint_export import export_checkpoint

    names = ("dtype", "shard_bytes", "pipeline", "everything", "prefix", "zero_stage", "processes")
    given = {name: getattr(options, name) for name in names}
    export_checkpoint(options.checkpoint, options.format, options.weights, options.out, given)
    return 0


def import_wan(options: argparse.Namespace) -> int:
    if options.run is not None:
        from megasora.commands.import_wan import import_wan_to_run

        import_wan_to_run(options.folder, options.run, options.overrides)
        return 0
    if options.overrides:
        raise MegaSoraError(f"{options.overrides[0]}: settings are of --run; --out writes weights only")
    from megasora.commands.import_wan import import_wan_to_file

    import_wan_to_file(options.folder, options.out)
    return 0


def import_dcp(options: argparse.Namespace) -> int:
    from megasora.commands.checkpoint_import import import_dcp_to_run

    import_dcp_to_run(options.folder, options.run, options.config, options.prefix, options.overrides)
    return 0


def import_deepspeed(options: argparse.Namespace) -> int:
    from megasora.commands.checkpoint_import import import_deepspeed_to_run

    import_deepspeed_to_run(options.folder, options.run, options.config, options.tag, options.overrides)
    return 0
