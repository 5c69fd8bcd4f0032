"""Commands of `megasora` and commands below them, and an option that several have."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from megasora.commands.argument_types import weights

KINDS = "ema, another average of the run, e.g. ema_0.999 or ema_sigma_0.05, or raw, the last step's"


def add_command(
    commands, name: str, function: Callable[[argparse.Namespace], int] | None, summary: str, text: str
) -> argparse.ArgumentParser:
    """A subparser of `commands`; `function(options)` runs the command and returns its exit code."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, help=summary, description=f"{summary}\n\n{text}", formatter_class=formatter)
    parser.set_defaults(function=function)
    return parser


def add_weights_option(parser: argparse.ArgumentParser, default: str | None = "ema", note: str = "") -> None:
    """`--weights KIND`. `note`: in place of the default in the help."""
    text = f"{KINDS}; {note or f'default {default}'}"
    parser.add_argument("--weights", type=weights, default=default, metavar="KIND", help=text)
