"""`megasora checkpoint import-dcp|import-deepspeed`: run folders of checkpoints of other programs."""

from __future__ import annotations

from pathlib import Path

from megasora.checkpoint.imported import IMPORTED
from megasora.checkpoint.store import read_state
from megasora.codec import resolve_codec
from megasora.commands.checkpoint_export import model_shapes
from megasora.commands.run_folder import new_run
from megasora.config import Config, load
from megasora.errors import MegaSoraError
from megasora.formats.recognize import check_format
from megasora.formats.safetensors_folder import check_new_folder
from megasora.observe.byte_progress import byte_progress


def import_dcp_to_run(place: Path, run: Path, config: Path | None, prefix: str | None, overrides: list[str]) -> None:
    """Writes the run folder `run`. `config`, `overrides`: its settings; of a whole training state, changes of them."""
    from megasora.formats.dcp_folder import open_dcp
    from megasora.formats.dcp_import import import_dcp

    check_format(place, "dcp")
    check_new_folder(run)
    total = sum(tensor.shape.numel() * 4 for tensor in open_dcp(place).tensors.values())
    with byte_progress("import", total) as advance:
        checkpoint = import_dcp(place, run, config, overrides, resolved_shapes, prefix, advance)
    print(f"{checkpoint.name} in {run}; {next_command(run / 'checkpoints' / checkpoint.name, run)}")


def import_deepspeed_to_run(place: Path, run: Path, config_file: Path | None, tag: str | None, overrides: list[str]):
    """Writes the run folder `run` with the weights and moments of a DeepSpeed checkpoint."""
    from megasora.formats.deepspeed_import import import_deepspeed

    check_format(place, "deepspeed")
    check_new_folder(run)
    if config_file is None and not overrides:
        raise MegaSoraError(
            "import-deepspeed needs the settings of the model: give --config RUN/config.yaml of the run, or key=value"
        )
    config = load(config_file, overrides)
    shapes = resolved_shapes(config)
    total = 4 * 3 * sum(shape.numel() for shape in shapes.values())  # weights and two moments
    with byte_progress("import", total) as advance, new_run(run, config) as store:
        checkpoint = import_deepspeed(place, store, shapes, tag, advance)
    print(f"{checkpoint.name} in {run}; {next_command(run / 'checkpoints' / checkpoint.name, run)}")


def next_command(checkpoint: Path, run: Path) -> str:
    """How a person goes on with an imported checkpoint."""
    if IMPORTED in read_state(checkpoint):
        return f"weights alone: sample from {run}, or train from them in another run with run.start=init:{checkpoint}"
    return f"go on with: megasora train {run / 'config.yaml'}"


def resolved_shapes(config: Config):
    """Shapes of the parameters of a run's model; a codec on disk gives its channels."""
    config.codec = resolve_codec(config.codec)
    return model_shapes(config)
