"""Checks of a run before a process group or a weight exists; `megasora.train --check` makes these alone.

Each raises MegaSoraError with the keys, the values and the remedy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megasora.config import Config, differences, load_run_config
from megasora.errors import MegaSoraError
from megasora.files import check_folder

if TYPE_CHECKING:
    from megasora.data.mixture import Mixture

# what may change between two launches of one run without changing what is trained
MUTABLE_ON_RESUME = (
    "run.dir", "run.device", "run.threads", "data.shards", "data.mixture", "data.prefetch_steps",
    "data.reader_threads", "data.read_timeout_seconds", "data.max_damaged_fraction",
    "optim.max_skipped_steps", "optim.spike",
    "ingest", "checkpoint", "validation", "sample", "evaluation", "wandb",
    "run.start", "run.debug_parallel", "run.debug_every", "run.hang_seconds",
    "run.ledger", "model.kernel_backend", "model.attention_backend", "model.deterministic", "model.recompute",
    "model.recompute_blocks", "parallel",
)  # fmt: skip


def check_run(config: Config) -> None:
    """All checks below."""
    check_run_folder(config)
    check_kernels(config)
    check_parallel(config)
    check_data(config)


def check_run_folder(config: Config) -> None:
    """`run.start` says what to start from, see `choose_start`; manifest and state.json of the checkpoint are intact.

    A run folder belongs to one configuration, except for the keys of MUTABLE_ON_RESUME.
    """
    from megasora.checkpoint.start import begins, choose_start
    from megasora.checkpoint.store import CheckpointStore

    run_dir = Path(config.run.dir)
    check_folder(run_dir, f"run.dir={run_dir}")
    choose_start(CheckpointStore(run_dir / "checkpoints"), config.run.start)
    if begins(run_dir, config.run.start) or not (run_dir / "config.yaml").is_file():
        return
    changed = differences(config, load_run_config(config.run.dir), MUTABLE_ON_RESUME)
    if changed:
        raise MegaSoraError(
            f"run.dir={config.run.dir} already holds another configuration ({'; '.join(changed[:8])}); "
            "choose another run.dir or give the saved values"
        )


def check_kernels(config: Config) -> None:
    """Triton kernels run on a CPU only if TRITON_INTERPRET=1 asks for it, as tests do."""
    import torch

    from megasora.kernels.launch import INTERPRETED

    on_gpu = config.run.device == "cuda" or (config.run.device == "auto" and torch.cuda.is_available())
    if config.model.kernel_backend == "triton" and not on_gpu and not INTERPRETED:
        raise MegaSoraError(
            "model.kernel_backend=triton needs a GPU, and this run has none; use model.kernel_backend=auto, or set "
            "TRITON_INTERPRET=1 in the environment: Triton then interprets the kernels, a thousand times slower"
        )


def check_parallel(config: Config) -> None:
    """The layout fits the processes and the model, and PATH of run.start=init:PATH exists."""
    from megasora.checkpoint.manifest import MANIFEST
    from megasora.checkpoint.start import initial_weights_to_read
    from megasora.parallel.launcher import world_size
    from megasora.parallel.layout import check_layout

    check_layout(config, world_size())
    path = initial_weights_to_read(Path(config.run.dir), config.run.start)
    if path is not None and not path.is_file() and not (path / MANIFEST).is_file():
        raise MegaSoraError(
            f"run.start=init:{path}: this is neither a file nor a checkpoint; give a safetensors file, or a folder "
            "RUN/checkpoints/step-XXXXXXXX"
        )


def check_data(config: Config) -> None:
    """The shards exist and were ingested with the codec, patch and text encoder of this run."""
    from megasora.build import patch_dim
    from megasora.codec import build_codec
    from megasora.data.mixture import open_mixture
    from megasora.data.shard_format import check_fingerprints
    from megasora.text import build_text_encoder

    if not config.data.shards and not config.data.mixture:
        raise MegaSoraError(
            "data.shards is not set; give the folder that `megasora ingest` wrote: data.shards=data/shards"
        )
    clips = open_mixture(config.data, "train")
    open_mixture(config.data, "val")
    manifest, folder = clips.manifest, clips.datasets[0].folder
    codec, encoder = build_codec(config.codec), build_text_encoder(config.text)
    check_fingerprints(manifest, folder, codec.fingerprint, encoder.fingerprint, list(config.data.patch))
    if manifest.patch_dim != patch_dim(config):
        raise MegaSoraError(f"{folder} has tokens of {manifest.patch_dim} features, this run {patch_dim(config)}")
    check_same_data(config, clips)


def check_same_data(config: Config, clips: Mixture) -> None:
    """A run is resumed on the clips that it began with: its cursor is a position in a plan made of them."""
    from megasora.checkpoint.start import choose_start
    from megasora.checkpoint.store import CheckpointStore, read_state

    checkpoint = choose_start(CheckpointStore(Path(config.run.dir) / "checkpoints"), config.run.start).checkpoint
    if checkpoint is None:
        return
    saved = read_state(checkpoint)["task"]["data"]
    changed = [
        f"{key}: {shorten(saved.get(key))} -> {shorten(new)}"
        for key, new in clips.identity().items()
        if saved.get(key) != new
    ]
    if changed:
        raise MegaSoraError(
            f"{checkpoint} was trained on other clips ({'; '.join(changed)}); give the shards and mixture weights that "
            "the run began with, or choose another run.dir"
        )


def shorten(value: Any) -> Any:
    """A value of `Mixture.identity` for a message: hashes with their first digits."""
    if isinstance(value, list):
        return [shorten(item) for item in value]
    return value[:8] if isinstance(value, str) else value
