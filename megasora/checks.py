"""Checks of a run before a process group or a weight exists; `megasora.train --check` makes these alone.

Each raises MegaSoraError with the keys, the values and the remedy.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from megasora.config import Config, differences, load_run_config, parse_size
from megasora.errors import MegaSoraError
from megasora.files import check_folder

# what may change between two launches of one run without changing what is trained
MUTABLE_ON_RESUME = (
    "run.dir", "run.device", "run.threads", "codec.path", "codec.device", "codec.chunk_frames", "codec.tile",
    "codec.tile_overlap", "data.shards", "data.mixture", "data.prefetch_steps",
    "data.reader_threads", "data.read_timeout_seconds", "data.max_damaged_fraction", "data.clips",
    "data.clip_cache_mib",
    "optim.max_skipped_steps", "optim.spike", "optim.ema_decays", "optim.ema_sigmas",
    "ingest", "checkpoint", "validation", "sample", "evaluation", "wandb",
    "run.start", "run.debug_parallel", "run.debug_every", "run.hang_seconds",
    "run.ledger", "model.kernel_backend", "model.attention_backend", "model.deterministic", "model.recompute",
    "model.recompute_blocks", "model.compile", "parallel",
)  # fmt: skip


def check_run(config: Config) -> None:
    """All checks of a run of megasora.train."""
    check_task(config, "dit")
    check_run_folder(config)
    check_kernels(config)
    check_attention(config)
    check_compiler(config)
    check_fp8(config)
    check_parallel(config)
    check_samples(config)
    check_data(config)


def check_codec_run(config: Config) -> None:
    """All checks of a run of megasora.train_codec."""
    check_task(config, "codec")
    check_run_folder(config)
    check_codec_parallel(config)
    if config.sample.every:
        raise MegaSoraError(
            f"sample.every={config.sample.every} samples a DiT during its training and is not for megasora.train_codec;"
            " use 0"
        )
    check_clips(config)


def check_task(config: Config, task: str) -> None:
    """The run folder, if it holds a run, holds one of this task: dit or codec."""
    from megasora.codec.vae.folder import task_of

    run, entry_points = Path(config.run.dir), {"dit": "megasora.train", "codec": "megasora.train_codec"}
    if not (run / "run.json").is_file():
        return
    own = "codec" if task_of(run) == "codec" else "dit"
    if own != task:
        raise MegaSoraError(
            f"run.dir={run} is a run of {entry_points[own]}, not of {entry_points[task]}; choose another run.dir"
        )


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


def check_attention(config: Config) -> None:
    """The device, dtype and head dim have model.attention_backend."""
    import torch

    from megasora.kernels.attention_choice import check_backend

    model, run = config.model, config.run
    on_gpu = run.device == "cuda" or (run.device == "auto" and torch.cuda.is_available())
    dtype = {"auto": "bfloat16" if on_gpu else "float32"}.get(run.dtype, run.dtype)
    if model.attention_backend == "auto" or (on_gpu and not torch.cuda.is_available()):  # the latter: said elsewhere
        return
    device = torch.device("cuda" if on_gpu else "cpu")
    try:
        check_backend(model.attention_backend, device, getattr(torch, dtype), model.head_dim, model.deterministic)
    except ValueError as error:
        raise MegaSoraError(f"model.attention_backend={model.attention_backend}: {error}") from None


def check_compiler(config: Config) -> None:
    """model.compile needs a C++ compiler."""
    if not config.model.compile:
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        raise MegaSoraError(
            "model.compile=true needs a C++ compiler, and none was found: install g++, set CXX to one, or use "
            "model.compile=false"
        ) from error


def check_fp8(config: Config) -> None:
    """The GPU of model.fp8_recipe has the products; a CPU emulates them."""
    import torch

    from megasora.kernels.float8 import why_not

    recipe, run = config.model.fp8_recipe, config.run
    if recipe == "none" or run.device == "cpu" or not torch.cuda.is_available():
        return
    reason = why_not(torch.device("cuda"), per_row=recipe != "tensorwise")
    remedy = "use model.fp8_recipe=none"
    if reason is None and run.dtype == "float32":
        reason, remedy = (
            "run.dtype=float32 is set, and its products give bfloat16",
            f"use run.dtype=bfloat16 or {remedy[4:]}",
        )
    if reason is not None:
        raise MegaSoraError(f"model.fp8_recipe={recipe}: {reason}; {remedy}")


def check_parallel(config: Config) -> None:
    """The layout fits the processes and the model, and PATH of run.start=init:PATH exists."""
    from megasora.parallel.launcher import world_size
    from megasora.parallel.layout import check_layout

    check_layout(config, world_size())
    check_initial_weights(config)


def check_samples(config: Config) -> None:
    """The clips that sample.every samples during training fit a pack, can be written, and have usable captions."""
    from megasora.build import token_grid
    from megasora.text import build_text_encoder

    sample = config.sample
    if not sample.every:
        return
    height, width = parse_size(sample.size, "sample.size")
    tokens = math.prod(token_grid(config, sample.frames, height, width))
    if tokens > config.data.tokens_per_pack:
        raise MegaSoraError(
            f"sample.every={sample.every} samples clips during training, of sample.frames={sample.frames} and "
            f"sample.size={sample.size}: {tokens} tokens, but data.tokens_per_pack={config.data.tokens_per_pack}; "
            "use fewer sample.frames, a smaller sample.size, or sample.every=0"
        )
    if sample.frames > 1 and (height % 2 or width % 2):
        raise MegaSoraError(f"sample.size={sample.size}: an H.264 video has an even height and width")
    encoder = build_text_encoder(config.text)
    if not encoder.precomputed:  # else its weights are loaded for it: in the training itself
        try:
            encoder.encode([*sample.prompts, sample.negative_prompt])
        except (MegaSoraError, UnicodeEncodeError) as error:
            raise MegaSoraError(f"sample.prompts: {error}") from None


def check_initial_weights(config: Config) -> None:
    """PATH of run.start=init:PATH exists, if it will be read."""
    from megasora.checkpoint.start import initial_weights_to_read
    from megasora.checkpoint.store import CheckpointStore
    from megasora.checkpoint.stored_weights import has_weights
    from megasora.formats.recognize import what_is

    path = initial_weights_to_read(Path(config.run.dir), config.run.start)
    if path is None or has_weights(path):
        return
    found, newest = what_is(path), CheckpointStore(path / "checkpoints").newest()
    remedy = f"give one of its checkpoints, e.g. run.start=init:{newest}" if newest is not None else found.remedy
    raise MegaSoraError(
        f"run.start=init:{path}: this is {found.description}, and no safetensors file, folder of them with an index "
        f"or checkpoint RUN/checkpoints/step-XXXXXXXX; {remedy or 'give one of these'}"
    )


def check_codec_parallel(config: Config) -> None:
    """The layout fits the processes, and PATH of run.start=init:PATH exists."""
    from megasora.parallel.launcher import world_size
    from megasora.parallel.layout import check_codec_layout

    check_codec_layout(config, world_size())
    if config.reconstruction.adversarial.weight and config.parallel.zero_stage == 3:
        raise MegaSoraError(
            "parallel.zero_stage=3 has no whole weights for the adaptive weight of reconstruction.adversarial; use "
            "parallel.zero_stage=1 or 2, or reconstruction.adversarial.weight=0"
        )
    check_initial_weights(config)


def check_clips(config: Config) -> None:
    """The clips exist, and are those that the run began with; so is the encoder, if the decoder alone is trained."""
    from megasora.codec.vae.folder import find_codec_folder, read_manifest
    from megasora.ingest.listing import listing_hash
    from megasora.ingest.sources import find_clips

    if not config.data.clips:
        raise MegaSoraError("data.clips is not set; give the clips to train on: data.clips=data/clips")
    clips = [clip for clip in find_clips(Path(config.data.clips)).clips if clip.split == "train"]
    if not clips:
        raise MegaSoraError(f"data.clips={config.data.clips} has no clip outside of its folder val, none to train on")
    identity = {"clips": len(clips), "listing": listing_hash(clips)}
    if config.reconstruction.train == "decoder":
        identity["encoder"] = read_manifest(find_codec_folder(Path(config.codec.path))).encoder_sha256
    check_same_data(config, identity)


def resolve_network(config: Config) -> Config:
    """The settings of a run of megasora.train_codec: with codec.path, the network is that of the codec there.

    Raises MegaSoraError where they are not those of a vae, or differ from those of the codec.
    """
    from megasora.codec import resolve_codec
    from megasora.codec.vae.folder import find_codec_folder, read_manifest

    name, train = config.codec.name, config.reconstruction.train
    if name != "vae":
        raise MegaSoraError(f"codec.name={name}: megasora.train_codec trains codec.name=vae; set it")
    if train == "decoder" and not config.codec.path:
        raise MegaSoraError(
            "reconstruction.train=decoder needs codec.path, the run folder of a finished megasora.train_codec run"
        )
    if not config.codec.path:
        return config
    if config.run.start.startswith("init:"):
        raise MegaSoraError(
            f"run.start={config.run.start} and codec.path={config.codec.path} both give initial weights; leave one out"
        )
    config = dataclasses.replace(config, codec=resolve_codec(config.codec))
    own = read_manifest(find_codec_folder(Path(config.codec.path))).vae
    for field in dataclasses.fields(own):
        given, value = getattr(config.vae, field.name), getattr(own, field.name)
        if given not in (value, getattr(type(own)(), field.name)):
            raise MegaSoraError(
                f"vae.{field.name}={given}, but the network of codec.path={config.codec.path} has {value}; leave "
                f"vae.{field.name} out"
            )
    return dataclasses.replace(config, vae=own)


def check_data(config: Config) -> None:
    """The shards exist and were ingested with the codec, patch and text encoder of this run."""
    from megasora.build import patch_dim
    from megasora.codec import codec_fingerprint
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
    encoder = build_text_encoder(config.text)
    check_fingerprints(manifest, folder, codec_fingerprint(config.codec), encoder.fingerprint, list(config.data.patch))
    if manifest.patch_dim != patch_dim(config):
        raise MegaSoraError(f"{folder} has tokens of {manifest.patch_dim} features, this run {patch_dim(config)}")
    check_same_data(config, clips.identity())


def check_same_data(config: Config, identity: dict[str, Any]) -> None:
    """A run is resumed on the clips that it began with: its cursor is a position in a plan made of them.

    `identity`: of the clips, as the task saves it.
    """
    from megasora.checkpoint.start import choose_start
    from megasora.checkpoint.store import CheckpointStore

    start = choose_start(CheckpointStore(Path(config.run.dir) / "checkpoints"), config.run.start)
    if start.checkpoint is None:
        return
    saved = start.state["task"]["data"]
    changed = [
        f"{key}: {shorten(saved.get(key))} -> {shorten(new)}" for key, new in identity.items() if saved.get(key) != new
    ]
    if changed:
        raise MegaSoraError(
            f"{start.checkpoint} was trained on other clips ({'; '.join(changed)}); give the shards and mixture "
            "weights that the run began with, or choose another run.dir"
        )


def shorten(value: Any) -> Any:
    """A value of `Mixture.identity` for a message: hashes with their first digits."""
    if isinstance(value, list):
        return [shorten(item) for item in value]
    return value[:8] if isinstance(value, str) else value
