"""`megasora checkpoint import-wan|export|verify`: weights from and for other programs, and the checksums of a run."""

from __future__ import annotations

import os
import shlex
import sys
from functools import partial
from pathlib import Path

import torch

from megasora.build import patch_dim
from megasora.checkpoint.damage import DamagedCheckpoint
from megasora.checkpoint.manifest import MANIFEST, verify_checksums
from megasora.checkpoint.safetensors_file import check_new_file
from megasora.checkpoint.sharded import ShardedCheckpoint, export
from megasora.checkpoint.store import CheckpointStore, find_checkpoint
from megasora.formats.wan import import_wan
from megasora.formats.wan_folder import WanFolder, read_wan
from megasora.config import load
from megasora.errors import MegaSoraError
from megasora.model.dit import VideoDiT
from megasora.model.init import initial_value
from megasora.observe.byte_progress import byte_progress
from megasora.sampling.run_to_sample import CHECKPOINT_KINDS
from megasora.text.embedders import FeatureEmbedder

BYTES_PER_WEIGHT = 4  # fp32


def import_wan_to_file(folder: Path, out: Path) -> None:
    """Writes the weights of a Wan model to `out`, and prints the settings of a run that starts from them."""
    wan = read_wan(folder)
    config = load(None, wan.settings())
    shapes = parameter_shapes(wan)
    with byte_progress("import", num_bytes(shapes)) as advance:
        import_wan(wan, shapes, partial(initial_value, seed=config.run.seed), out, advance)
    print(f"weights in {out}; to train them further, append to `megasora train YAML`:")
    print(" \\\n".join(shlex.quote(setting) for setting in (*wan.settings(), f"run.start=init:{out}")))


def parameter_shapes(wan: WanFolder) -> dict[str, torch.Size]:
    """Shapes of the parameters of the VideoDiT for these weights; the text encoder need not be on this machine."""
    config = load(None, wan.settings())
    m = config.model
    with torch.device("meta"):
        model = VideoDiT(m, patch_dim(config), FeatureEmbedder(wan.text_dim, m.width, m.text_depth, m.heads))
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def export_to_file(checkpoint: Path, weights: str, out: Path) -> None:
    """Writes the full weights of a checkpoint or of the newest one of a run to `out`. `weights`: ema or raw."""
    check_new_file(out)
    folder = find_checkpoint(checkpoint, report=lambda text: print(text, file=sys.stderr))
    sharded = ShardedCheckpoint(folder)
    kind = sharded.stored_kind(CHECKPOINT_KINDS[weights])
    with byte_progress("export", num_bytes(sharded.shapes)) as advance:
        export(sharded, kind, out, advance)
    print(f"{weights if kind == CHECKPOINT_KINDS[weights] else 'imported'} weights of {folder} in {out}")


def verify_checkpoints(path: Path) -> int:
    """Prints a line per checkpoint of a run folder, or for the checkpoint `path`; returns how many are not whole.

    Every byte is read, nothing is changed. Raises MegaSoraError if there is no checkpoint.
    """
    checkpoints = [path] if os.path.lexists(path / MANIFEST) else CheckpointStore(path / "checkpoints").complete()
    if not checkpoints:
        raise MegaSoraError(f"{path} is no checkpoint, and no run folder that has one")
    problems = 0
    for checkpoint in checkpoints:
        try:
            files = verify_checksums(checkpoint).files
            verdict = f"whole: {len(files)} files, {sum(size for size, _ in files.values()):,} bytes"
        except DamagedCheckpoint as error:
            problems, verdict = problems + 1, error.problem
        except MegaSoraError as error:  # of another version
            problems, verdict = problems + 1, str(error)
        print(f"{checkpoint.name}  {verdict}", flush=True)
    return problems


def num_bytes(shapes: dict[str, torch.Size]) -> int:
    return BYTES_PER_WEIGHT * sum(shape.numel() for shape in shapes.values())
