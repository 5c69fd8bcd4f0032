"""Samples videos with a trained run: text encoder, model with the EMA weights, codec."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megasora.build import build_model, patch_dim
from megasora.checkpoint.manifest import step_of
from megasora.checkpoint.sharded import ShardedCheckpoint
from megasora.checkpoint.store import CheckpointStore, find_checkpoint
from megasora.codec import build_codec
from megasora.codec.fingerprint import without_tiles
from megasora.codec.vae.folder import task_of
from megasora.config import Config, SampleConfig, load_run_config, token_pixels
from megasora.data.pack import Record
from megasora.data.patches import frames_to_float, frames_to_uint8, patchify, unpatchify
from megasora.errors import MegaSoraError, printable
from megasora.files import read_regular_file
from megasora.jsonl import parse_json
from megasora.sampling.generate import Prompt, generate
from megasora.text import build_text_encoder

MAX_RUN_INFO_BYTES = 1 << 20
CHECKPOINT_KINDS = {"ema": "ema", "raw": "weights"}  # values of --weights -> kinds in a checkpoint


@dataclass(frozen=True)
class Request:
    """A video to sample. `image`: uint8 [H, W, 3], its first frame. `sample_id` and the seed are its noise's key."""

    prompt: str
    height: int
    width: int
    frames: int
    fps: float
    image: np.ndarray | None = None
    sample_id: int = 0


class SamplingPipeline:
    """Calling it samples a list of requests. `run` and `step` name the checkpoint in `provenance`."""

    def __init__(self, config: Config, model: torch.nn.Module, run: str, step: int, device: torch.device):
        self.config, self.run, self.step, self.device = config, run, step, device
        self.model = model.to(device).eval()
        self.codec, self.encoder = build_codec(config.codec), build_text_encoder(config.text)

    @classmethod
    def from_run(cls, run_dir: Path, weights: str = "ema", device: str = "auto") -> SamplingPipeline:
        """Loads the newest checkpoint of a run folder. `weights`: ema or raw. Raises MegaSoraError if there is none."""
        if not (run_dir / "config.yaml").is_file():
            raise MegaSoraError(f"{run_dir} is not a run folder: it has no config.yaml; train one with megasora train")
        if task_of(run_dir) == "codec":
            raise MegaSoraError(
                f"{run_dir} is a run of megasora.train_codec, which trains a codec, not a DiT; give a run of "
                "megasora.train; for reconstructions use: megasora codec eval"
            )
        config = load_run_config(run_dir)
        if CheckpointStore(run_dir / "checkpoints").newest() is None:
            raise MegaSoraError(
                f"{run_dir / 'checkpoints'} holds no checkpoint to sample from; train until step checkpoint.every="
                f"{config.checkpoint.every}, or to the end"
            )
        folder = find_checkpoint(run_dir, report=lambda text: print(text, file=sys.stderr))
        step = step_of(folder.name)
        config.model.kernel_backend = config.model.attention_backend = "auto"  # this machine may differ from training's
        model = build_model(config, patch_dim(config))
        checkpoint = ShardedCheckpoint(folder)
        kind = checkpoint.stored_kind(CHECKPOINT_KINDS[weights])
        model.load_state_dict({name: checkpoint.full_tensor(kind, name) for name in checkpoint.shapes})
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        pipeline = cls(config, model, run_dir.resolve().name, step, torch.device(device))
        check_codec(run_dir, config, pipeline.codec.fingerprint)
        return pipeline

    def check(self, request: Request) -> None:
        """Raises MegaSoraError if the model cannot sample this request."""
        if not request.prompt.strip():
            raise MegaSoraError("--prompt is empty; describe the clip, e.g. --prompt 'a red circle moves right'")
        try:
            request.prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise MegaSoraError(f"--prompt is not UTF-8 text: {error}") from None
        _, ph, pw = token_pixels(self.config)
        if request.height % ph or request.width % pw:
            near = f"{max(ph, round(request.height / ph) * ph)}x{max(pw, round(request.width / pw) * pw)}"
            raise MegaSoraError(
                f"--size {request.height}x{request.width} must be multiples of the {ph}x{pw} pixels that a token "
                f"covers; nearest: {near}"
            )
        if request.frames < 1:
            raise MegaSoraError(f"--frames {request.frames} must be at least 1")
        if request.image is not None and request.image.shape[:2] != (request.height, request.width):
            height, width = request.image.shape[:2]
            raise MegaSoraError(
                f"--image has {height}x{width} pixels, --size is {request.height}x{request.width}; leave --size out, "
                "or give an image of that size"
            )

    def __call__(
        self, requests: list[Request], sample: SampleConfig, seed: int, progress: Callable[[], None] = lambda: None
    ) -> list[np.ndarray]:
        """uint8 [F, H, W, 3] of each request, sampled in one pack. Calls `progress` after each model call."""
        for request in requests:
            self.check(request)
        negative_SE = self.encode_negative_prompt(sample)
        prompts = [dataclasses.replace(self.build_prompt(request), negative_SE=negative_SE) for request in requests]
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")
        with autocast:
            patches = generate(self.model, prompts, self.config.objective, sample, seed, self.device, progress)
        patch = tuple(self.config.data.patch)
        videos = []
        for request, prompt, tokens in zip(requests, prompts, patches, strict=True):
            frames = self.codec.decode(unpatchify(tokens.float(), prompt.record.grid, patch))
            videos.append(frames_to_uint8(frames)[: request.frames].numpy())
        return videos

    def encode_negative_prompt(self, sample: SampleConfig) -> torch.Tensor | None:
        """[S, E]; None if guidance uses the null token, or there is none."""
        if sample.unconditional == "null_token" or sample.guidance_scale == 1:
            return None
        return self.encoder.encode([sample.negative_prompt])[0]

    def build_prompt(self, request: Request) -> Prompt:
        _, ph, pw = token_pixels(self.config)
        grid = (self.codec.latent_frames(request.frames), request.height // ph, request.width // pw)
        patches = torch.zeros(grid[0] * grid[1] * grid[2], patch_dim(self.config))
        clean = (0, 0)
        if request.image is not None:
            frame = frames_to_float(torch.from_numpy(request.image)[None])
            first, _ = patchify(self.codec.encode(frame), tuple(self.config.data.patch))
            patches[: len(first)] = first
            clean = (1, 0)
        native = (request.height, request.width, request.frames, request.fps if request.frames > 1 else 0.0)
        text = self.encoder.encode([request.prompt])[0]
        return Prompt(Record(request.sample_id, patches, grid, text, native, request.prompt), clean)

    def provenance(self, prompt: str, seed: int) -> str:
        """JSON text for the metadata of a file: that it is generated, and by which run."""
        return json.dumps(
            {"ai_generated": True, "by": "MegaSora", "run": self.run, "step": self.step, "prompt": prompt, "seed": seed}
        )


def check_codec(run_dir: Path, config: Config, fingerprint: str) -> None:
    """Raises MegaSoraError if a run was trained on latents of another codec than this one, as its run.json says.

    A decoder that was trained further since is accepted, and so are other tiles.
    """
    try:
        trained_with = parse_json(read_regular_file(run_dir / "run.json", MAX_RUN_INFO_BYTES))["codec"]
    except (OSError, ValueError, TypeError, KeyError):  # of another version
        return
    if without_tiles(str(trained_with)) != without_tiles(fingerprint):
        place = f"codec.path={config.codec.path}" if config.codec.path else "its codec"
        raise MegaSoraError(
            f"{run_dir} was trained on latents of {printable(str(trained_with), 200)}, {place} is now {fingerprint}; "
            "put the codec of the training back"
        )


def override_sample_config(config: Config, **changes) -> SampleConfig:
    """A copy of the run's `sample` section with these changes; None leaves a setting as it is."""
    return dataclasses.replace(config.sample, **{key: value for key, value in changes.items() if value is not None})
