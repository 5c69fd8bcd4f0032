"""RunToSample: the checkpoint of a run folder that samples are made with, and what the run was trained on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megasora.build import build_model, patch_dim
from megasora.checkpoint.manifest import step_of
from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.start import newest_readable
from megasora.checkpoint.store import CheckpointStore, find_checkpoint
from megasora.checkpoint.stored_weights import CheckpointWeights
from megasora.checkpoint.weight_kinds import kind_of
from megasora.codec.fingerprint import without_tiles
from megasora.codec.vae.folder import task_of
from megasora.config import Config, load_run_config
from megasora.errors import MegaSoraError, printable
from megasora.files import read_regular_file
from megasora.jsonl import parse_json

MAX_RUN_INFO_BYTES = 1 << 20


@dataclass(frozen=True)
class RunToSample:
    """`weights`: of --weights: raw, ema, or another average. `config` has the settings of the run, with the backends of
    this machine."""

    folder: Path
    config: Config
    weights: str
    checkpoint: ShardedCheckpoint
    step: int

    @classmethod
    def open(cls, folder: Path, weights: str = "ema", is_verified: bool = True) -> RunToSample:
        """The newest whole checkpoint of a run folder. Raises MegaSoraError if there is none.

        `is_verified`: every byte is read first, and the checkpoint before a damaged one is taken. Otherwise the newest
        one is taken whose manifest and state are intact, and its weights are verified when they are read.
        """
        if not (folder / "config.yaml").is_file():
            raise MegaSoraError(f"{folder} is not a run folder: it has no config.yaml; train one with megasora train")
        if task_of(folder) == "codec":
            raise MegaSoraError(
                f"{folder} is a run of megasora.train_codec, which trains a codec, not a DiT; give a run of "
                "megasora.train; for reconstructions use: megasora codec eval"
            )
        config = load_run_config(folder)
        complete = CheckpointStore(folder / "checkpoints").complete()
        if not complete:
            raise MegaSoraError(
                f"{folder / 'checkpoints'} holds no checkpoint to sample from; train until step checkpoint.every="
                f"{config.checkpoint.every}, or to the end"
            )
        path = None if is_verified else newest_readable(complete)[0]
        if path is None:
            path = find_checkpoint(folder, report=lambda text: print(text, file=sys.stderr))
        config.model.kernel_backend = config.model.attention_backend = "auto"  # this machine may differ from training's
        config.model.deterministic = False  # there is no backward pass
        config.model.fp8_recipe = "none"  # of training
        opened = cls(folder, config, weights, ShardedCheckpoint(path), step_of(path.name))
        kind_of(opened.checkpoint, weights)  # raises for an average that it has not
        return opened

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def stored_weights(self) -> CheckpointWeights:
        return CheckpointWeights(self.checkpoint, kind_of(self.checkpoint, self.weights), str(self.folder))

    def build_model(self) -> torch.nn.Module:
        """The whole model, on the CPU, fp32."""
        with torch.device("meta"):
            model = build_model(self.config, patch_dim(self.config))
        weights = self.stored_weights
        for name, parameter in model.to_empty(device="cpu").named_parameters():
            weights.fill(parameter, name)
        return model

    def trained_on(self) -> TrainedOn:
        """The largest training clips, as run.json says."""
        info = read_run_info(self.folder)
        frames, grid = info.get("max_frames"), info.get("max_grid")
        is_valid = isinstance(frames, int) and isinstance(grid, list) and len(grid) == 3 and all(grid)
        return TrainedOn(frames, tuple(grid)) if is_valid else TrainedOn()


@dataclass(frozen=True)
class TrainedOn:
    """The largest training clips; None: not known."""

    frames: int | None = None
    grid: tuple[int, int, int] | None = None  # the most latent frames, rows and columns of tokens


def check_codec(run_dir: Path, config: Config, fingerprint: str) -> None:
    """Raises MegaSoraError if a run was trained on latents of another codec than this one, as its run.json says.

    A decoder that was trained further since is accepted, and so are other tiles.
    """
    trained_with = read_run_info(run_dir).get("codec")
    if trained_with is not None and without_tiles(str(trained_with)) != without_tiles(fingerprint):
        place = f"codec.path={config.codec.path}" if config.codec.path else "its codec"
        raise MegaSoraError(
            f"{run_dir} was trained on latents of {printable(str(trained_with), 200)}, {place} is now {fingerprint}; "
            "put the codec of the training back"
        )


def read_run_info(run_dir: Path) -> dict[str, Any]:
    """run.json; empty if there is none, or it is of another version."""
    try:
        info = parse_json(read_regular_file(run_dir / "run.json", MAX_RUN_INFO_BYTES))
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}
