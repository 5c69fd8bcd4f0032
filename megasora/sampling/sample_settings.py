"""The settings of a command that samples: those of the run, then `key=value` overrides, then flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megasora.config import Config, load, load_run_config
from megasora.errors import MegaSoraError, printable

CODEC = ("codec.path=", "codec.device=", "codec.tile=", "codec.tile_overlap=", "codec.chunk_frames=")
SECTIONS = ("sample.", "parallel.", *CODEC)  # that sampling reads; all else is of the training
FLAGS = {"guidance_scale": "--guidance-scale", "num_inference_steps": "--num-inference-steps", "solver": "--solver"}


def run_settings(run: Path, overrides: Sequence[str], flags: Mapping[str, Any]) -> Config:
    """The configuration of a run folder with these changes. `flags`: values by the key in section sample; None: none.

    Raises MegaSoraError with the name of the flag or key.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise MegaSoraError(f"{run} is not a run folder: it has no config.yaml; train one with megasora train")
    for text in overrides:
        if not text.startswith(SECTIONS):
            raise MegaSoraError(
                f"{printable(text, 60)}: megasora sample takes settings of sample.*, under torchrun of parallel.*, and "
                "codec.path, codec.device, codec.tile, codec.chunk_frames; the others are of the run"
            )
    config = load_run_config(run)
    given = [text for text in overrides if not text.startswith("parallel.")]
    if given:
        config = load(path, given)
    for key, name in FLAGS.items():
        value = flags.get(key)
        if value is not None:
            given.append(f"sample.{key}={value}")
            try:
                config = load(path, given)
            except MegaSoraError as error:
                raise MegaSoraError(f"{name} {value}: {error}") from None
    return config
