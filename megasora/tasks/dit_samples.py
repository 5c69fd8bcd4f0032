"""Samples of fixed prompts during training, on the training's own ranks and layout, with the weights of the moment.

    RUN/train_samples/step-00001000/  000.mp4 or .png, 000.sheet.png, 000.json (signed)   a prompt
                                      sheet.png                                           all prompts
                                      samples.json                                        how they were made

The prompts are divided over the data ranks, and all of these call the model equally often. The ranks that share packs
all get the patches; each decodes some of them and writes the files. A folder appears when it is complete. The noise of
a prompt is the same at every step, so only the weights change its sample.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from megasora.build import patch_dim, token_grid
from megasora.codec import build_codec
from megasora.config import Config, SampleConfig, parse_size
from megasora.data.clip_writer import write_image, write_video
from megasora.data.pack import Record
from megasora.errors import MegaSoraError
from megasora.files import sync, write_text_atomic
from megasora.parallel.denoiser import Denoiser
from megasora.parallel.mesh import Mesh
from megasora.parallel.world import World
from megasora.parallel.zero import ZeroEngine
from megasora.sampling.generate import ClipPrompt, generate
from megasora.sampling.latents import ClipCoder
from megasora.sampling.provenance import provenance_comment, signed_record
from megasora.sampling.rope import scaled_rope
from megasora.sampling.sheet import contact_sheet, stacked
from megasora.sampling.watermark import apply_watermark
from megasora.tasks.codec_pictures import fitted

if TYPE_CHECKING:
    from megasora.text import TextEncoder

FOLDER = "train_samples"  # of a run
SHEET_FRAMES = 8


class Stopped(Exception):
    """A stop was requested while a pack was sampled."""


@dataclasses.dataclass(frozen=True)
class EncodedPrompts:
    texts_SE: list[Tensor]
    negative_SE: Tensor | None  # None: guidance uses the null token


def encode_prompts(sample: SampleConfig, encoder: TextEncoder, world: World) -> EncodedPrompts:
    """The prompts of sample.prompts. The main process encodes them, so that others need no weights of the encoder.

    Raises MegaSoraError on all ranks where one cannot be encoded. All ranks must call it.
    """
    encoded, error = None, ""
    if world.is_main:
        negative = [sample.negative_prompt] if sample.unconditional == "negative_prompt" else []
        try:
            *texts, last = encoder.encode([*sample.prompts, *negative])
            encoded = EncodedPrompts(texts, last) if negative else EncodedPrompts([*texts, last], None)
        except MegaSoraError as failure:
            error = f"sample.prompts: {failure}"
    encoded, error = world.broadcast_object((encoded, error))
    if error:
        raise MegaSoraError(error)
    return encoded


class TrainingSamples:
    """`trained_grid`: the most latent frames, rows and columns of tokens of a training clip, for sample.rope."""

    def __init__(
        self,
        config: Config,
        prompts: EncodedPrompts,
        engine: ZeroEngine,
        trained_grid: tuple[int, int, int],
        world: World,
        mesh: Mesh,
    ):
        self.config, self.sample, self.prompts = config, config.sample, prompts
        self.grid = token_grid(config, config.sample.frames, *parse_size(config.sample.size, "sample.size"))
        self.folder = Path(config.run.dir) / FOLDER
        self.engine, self.trained_grid, self.world, self.mesh = engine, trained_grid, world, mesh
        stages = list(engine.module) if isinstance(engine.module, nn.ModuleList) else [engine.module]
        self.denoise = Denoiser(engine.predict, stages, config.parallel, mesh, world.device)
        sharing = (mesh.pipeline, mesh.context, mesh.tensor)  # the ranks along these have the same packs
        self.sharing_rank, self.sharing_size = 0, 1
        for axis in sharing:
            self.sharing_rank = self.sharing_rank * axis.size + axis.rank
            self.sharing_size *= axis.size

    @cached_property
    def coder(self) -> ClipCoder:
        """The codec, which is loaded when a clip is decoded for the first time."""
        return ClipCoder(build_codec(self.config.codec), tuple(self.config.data.patch))

    def write(self, step: int, heartbeat: Callable[[str], None], stop_requested: Callable[[], bool]) -> None:
        """Samples all prompts and writes the folder of `step`; one that is there is replaced. All ranks must call it.

        `heartbeat` is called before each model call and each decoding. If `stop_requested()` is true on any rank after
        a model call, nothing is written: the time until this process is killed is for a checkpoint.
        """
        start, staging = time.monotonic(), self.folder / f".step-{step:08d}.part"
        activity = f"the samples of step {step}"

        def progress() -> None:
            if bool(self.world.all_reduce_sum(torch.tensor(int(stop_requested())))):
                raise Stopped
            heartbeat(activity)

        if self.world.is_main:
            self.remove_incomplete()
            staging.mkdir(parents=True)
        self.world.barrier()
        try:
            for indices in self.packs():
                heartbeat(activity)
                patches = self.generate(indices, progress)
                for number, (index, patches_LP) in enumerate(zip(indices, patches, strict=True)):
                    if index is not None and number % self.sharing_size == self.sharing_rank:
                        heartbeat(f"writing sample {index} of step {step}")
                        self.write_clip(staging, index, step, patches_LP)
            heartbeat(f"the other processes' {activity.removeprefix('the ')}")
            self.world.barrier()
            if self.world.is_main:
                self.commit(staging, step, time.monotonic() - start)
        except Stopped:  # on all ranks, after the same model call
            if self.world.is_main:
                self.remove_incomplete()
        self.world.barrier()
        if self.engine.attention is not None:
            self.engine.attention.pop_bytes_sent()  # those of training steps are counted

    def remove_incomplete(self) -> None:
        """Removes folders that were not completed, e.g. by a process that was killed."""
        for folder in self.folder.glob(".step-*.part"):
            shutil.rmtree(folder, ignore_errors=True)

    def packs(self) -> list[list[int | None]]:
        """The prompts of each pack of this data rank; None in place of a prompt: all ranks have equally many packs of
        equally many clips."""
        data, count = self.mesh.data, len(self.sample.prompts)
        own: list[int | None] = list(range(data.rank, count, data.size))
        own += [None] * (-(-count // data.size) - len(own))
        t, h, w = self.grid
        in_pack = max(1, self.config.data.tokens_per_pack // (t * h * w))
        return [own[i : i + in_pack] for i in range(0, len(own), in_pack)]

    def generate(self, indices: list[int | None], progress: Callable[[], None]) -> list[Tensor]:
        """The patches fp32 [l, P] of each prompt, on the CPU."""
        prompts = [self.clip_prompt(0 if index is None else index) for index in indices]
        with scaled_rope(self.denoise.stages, self.sample.rope, self.trained_grid, self.grid):
            return generate(
                self.denoise, prompts, self.config.objective, self.sample, self.world.device, self.denoise.pad_tokens,
                progress,
            )  # fmt: skip

    def clip_prompt(self, index: int) -> ClipPrompt:
        sample, (t, h, w) = self.sample, self.grid
        height, width = parse_size(sample.size, "sample.size")
        native = (height, width, sample.frames, sample.fps if sample.frames > 1 else 0.0)
        patches_LP = torch.zeros(t * h * w, patch_dim(self.config))
        record = Record(index, patches_LP, self.grid, self.prompts.texts_SE[index], native, sample.prompts[index])
        prompt = ClipPrompt.of_text(record, self.config.run.seed)
        return dataclasses.replace(prompt, negative_SE=self.prompts.negative_SE)

    # ------------------------------------------------------------------ files

    def write_clip(self, staging: Path, index: int, step: int, patches_LP: Tensor) -> None:
        """Decodes a prompt's patches; writes the clip and its contact sheet."""
        size, text = parse_size(self.sample.size, "sample.size"), self.sample.prompts[index]
        frames_FHWC = self.coder.decode(patches_LP, self.grid, size)[: self.sample.frames]
        if self.sample.watermark:
            frames_FHWC = np.stack([apply_watermark(frame) for frame in frames_FHWC])
        comment = self.provenance(text, step)
        if self.sample.frames > 1:
            write_video(frames_FHWC, self.sample.fps, staging / self.file_name(index), comment)
        else:
            write_image(frames_FHWC[0], staging / self.file_name(index), comment)
        chosen = np.unique(np.linspace(0, len(frames_FHWC) - 1, SHEET_FRAMES).round().astype(int))
        small_FHWC = np.stack([fitted(frames_FHWC[i]) for i in chosen])
        write_image(contact_sheet([(text, small_FHWC)], zoom=1), staging / f"{index:03d}.sheet.png", comment)

    def commit(self, staging: Path, step: int, seconds: float) -> None:
        """On the main process: sidecars, the sheet of all prompts, samples.json, and the name of the folder."""
        from PIL import Image

        settings = {k: v for k, v in dataclasses.asdict(self.sample).items() if k not in ("prompts", "every")}
        how = {"weights": "ema", "settings": settings}
        rows, prompts = [], []
        for index, text in enumerate(self.sample.prompts):
            with Image.open(staging / f"{index:03d}.sheet.png") as row:
                rows.append(np.array(row.convert("RGB")))
            record = signed_record(json.loads(self.provenance(text, step)) | how, staging / self.file_name(index))
            write_text_atomic(staging / f"{index:03d}.json", json.dumps(record, indent=1) + "\n")
            prompts.append({"prompt": text, "file": self.file_name(index)})
        write_image(stacked(rows), staging / "sheet.png", self.provenance("contact sheet", step))
        seed, seconds = self.config.run.seed, round(seconds, 1)
        summary = {"step": step, "seed": seed, "seconds": seconds, **how, "prompts": prompts}
        write_text_atomic(staging / "samples.json", json.dumps(summary, indent=1) + "\n")
        sync(staging)
        final = self.folder / f"step-{step:08d}"
        shutil.rmtree(final, ignore_errors=True)  # of before a resume
        os.replace(staging, final)

    def file_name(self, index: int) -> str:
        return f"{index:03d}.mp4" if self.sample.frames > 1 else f"{index:03d}.png"

    def provenance(self, text: str, step: int) -> str:
        """JSON text for the metadata of a file."""
        run = Path(self.config.run.dir).resolve().name
        return provenance_comment(run, step, text, self.config.run.seed)
