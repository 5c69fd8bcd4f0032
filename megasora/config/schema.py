"""The configuration tree: one dataclass per section, one comment per key.

All defaults are here. `validate.py` checks values, `load.py` reads YAML and overrides.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RunConfig:
    dir: str = "runs/default"  # run folder: everything that the run writes
    seed: int = 0  # of weights, data order, noise, timesteps and dropout
    steps: int = 100_000  # optimizer steps
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "auto"  # auto | float32 | bfloat16; auto: bfloat16 on a GPU, float32 on a CPU
    threads: int = 0  # CPU threads of torch per process; 0: cores / processes
    debug_parallel: bool = False  # compare hashes of the tensors that must be equal on several ranks
    debug_every: int = 100  # steps between two such comparisons; the first is step 1
    hang_seconds: float = 540.0  # without a heartbeat for this long, the watchdog aborts the run
    ledger: bool = False  # log the sample ids of each step


@dataclass
class CodecConfig:
    name: str = "dct"
    factors: list[int] = field(default_factory=lambda: [4, 8, 8])  # frames, rows, columns of pixels per latent
    channels: int = 48  # DCT coefficients kept of 3 * product(factors), lowest frequencies first


@dataclass
class TextConfig:
    name: str = "bytes"  # bytes | t5 | clip
    path: str = ""  # of the t5 or clip weights: folder or hub name
    max_tokens: int = 64  # longest caption in tokens; a longer one is an error, it is never truncated
    pad: bool = False  # t5, clip: pad the features with zeros to max_tokens and attend to the padding (Wan)


@dataclass
class TokenDropConfig:
    """Fraction of each training clip's tokens that is dropped (patch n' pack), linear in the epoch."""

    start: float = 0.0  # fraction at epoch 0; start = end = 0: no dropping
    end: float = 0.0  # fraction from epoch `epochs` on
    epochs: float = 0.0  # length of the linear schedule


@dataclass
class DataConfig:
    shards: str = ""  # folder written by `megasora ingest`
    mixture: list[str] = field(default_factory=list)  # several such folders, in place of `shards`
    mixture_weights: list[float] = field(default_factory=list)  # relative sampling weight of each folder
    patch: list[int] = field(default_factory=lambda: [1, 1, 1])  # latents per token: frames, rows, columns
    tokens_per_pack: int = 4096  # length of one micro-batch
    packs_per_step: int = 8  # packs per optimizer step, over all data ranks
    packing_window: int = 262_144  # consecutive clips of an epoch that are packed together; more: better balance
    split_long: bool = False  # split clips longer than a pack in time; false: such a clip is an error
    token_drop: TokenDropConfig = field(default_factory=TokenDropConfig)
    prefetch_steps: int = 2  # steps that are read ahead
    reader_threads: int = 4  # reader threads; 0: the prefetch thread reads the clips itself
    read_timeout_seconds: float = 300.0  # a read of one clip that takes longer ends the run
    max_damaged_fraction: float = 0.0  # largest tolerated fraction of damaged clips, which are skipped; 0: none


@dataclass
class IngestConfig:
    missing_caption: str = "error"  # error | skip | empty
    max_height: int = 4320  # pixels; a larger clip is rejected
    max_width: int = 7680  # pixels
    max_frames: int = 7200
    max_clip_mib: int = 65_536  # MiB of all decoded frames of a clip, 3 bytes per pixel
    worker_memory_mib: int = 4096  # address space of a decode worker
    decode_timeout_seconds: float = 1800.0  # wall-clock time per clip
    shard_mib: int = 256  # a shard is closed when it reaches this size
    clips_per_block: int = 1024  # consecutive clips per ingest block, which is written atomically
    workers: int = 0  # decode workers; 0: one per core
    fit_height: int = 0  # pixels; larger clips are scaled down to fit, keeping their aspect ratio; 0: no limit
    fit_width: int = 0  # pixels
    max_fps: float = 0.0  # frames are skipped to bring faster clips down to this rate; 0: no limit
    min_seconds: float = 0.0  # shorter videos are rejected; images are not
    max_seconds: float = 0.0  # longer videos are rejected; 0: no limit
    min_motion: float = 0.0  # mean change between frames, grey levels of 255; videos below it are rejected
    min_contrast: float = 0.0  # mean standard deviation within a frame, grey levels; clips below it are rejected
    record_quality: bool = False  # write motion, contrast and brightness to meta.json even without a limit
    scores: list[str] = field(default_factory=list)  # module:function, see megasora/ingest/filters.py


@dataclass
class ModelConfig:
    width: int = 384  # hidden size
    depth: int = 12  # transformer blocks
    heads: int = 6  # attention heads
    mlp_ratio: float = 4.0  # hidden features of the MLP / width
    modulation: str = "block"  # block: one projection per block (DiT); shared: one, and a table per block (PixArt, Wan)
    init_from: str = ""  # initial weights: safetensors of a full model, or a checkpoint; empty: megasora.model.init
    qk_norm: str = "per_head"  # RMSNorm of q and k: per_head | across_heads (Wan) | none
    rope_base: float = 10_000.0
    rope_ntk_factor: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])  # t, h, w: new / trained clip size
    kernel_backend: str = "auto"  # auto | triton | torch; auto: triton on a GPU, torch on a CPU
    attention_backend: str = "auto"  # auto | flash3 | flash2 | varlen | sdpa | math; auto: the first available one
    deterministic: bool = True  # attention sums in a fixed order: runs repeat bitwise; false: faster on GPUs
    text_depth: int = 1  # transformer blocks over the text tokens
    recompute: str = "none"  # activations recomputed in backward: none | full | keep_attention: all but attention's
    recompute_blocks: int = 0  # number of blocks that recompute, evenly spaced; 0: all

    @property
    def head_dim(self) -> int:
        """Features of an attention head."""
        return self.width // self.heads

    @property
    def mlp_hidden(self) -> int:
        """Hidden features of an MLP."""
        return int(self.width * self.mlp_ratio)


@dataclass
class FrameConditioningConfig:
    """Relative weights of the choices which latent frames of a training clip stay clean."""

    none: float = 0.6  # no frame
    first: float = 0.15  # the first frame
    last: float = 0.05  # the last frame
    head: float = 0.08  # the first k frames, k random
    tail: float = 0.06  # the last k frames
    both: float = 0.06  # k frames, divided between both ends


@dataclass
class ObjectiveConfig:
    logit_mean: float = 0.0  # mean of the logit-normal distribution of t
    logit_std: float = 1.0  # its standard deviation
    shift: float = 1.0  # t' = a t / (1 + (a - 1) t), a = shift * sqrt(tokens / shift_tokens), at least 1
    shift_tokens: int = 256  # clip length in tokens at which a = shift
    caption_dropout: float = 0.1  # probability that a caption is replaced by the null token
    frame_conditioning: FrameConditioningConfig = field(default_factory=FrameConditioningConfig)


@dataclass
class OptimConfig:
    lr: float = 1e-4  # peak learning rate
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 1000  # linear from 0 to lr
    min_lr_ratio: float = 0.05  # lr at the end of the cosine / lr
    max_grad_norm: float = 1.0  # clips the global gradient norm
    ema_decay: float = 0.9999  # per step; 0: no averaging


@dataclass
class ParallelConfig:
    """Sizes of the mesh axes; the data axis has the remaining processes."""

    tensor: int = 1  # ranks that share each weight matrix and, between matrices, the tokens
    context: int = 1  # ranks that share the tokens of a pack
    ulysses: int = 1  # part of context: ranks that exchange heads for tokens; the others form the ring
    pipeline: int = 1  # ranks that share the blocks
    schedule: str = "1f1b"  # 1f1b | interleaved | zbv (zero bubble, V-shaped)
    stages_per_rank: int = 1  # interleaved: stages per pipeline rank; zbv has 2
    zero_stage: int = 1  # sharded over data x context: 1: optimizer states; 2: and gradients; 3: and weights


@dataclass
class CheckpointConfig:
    every: int = 1000  # steps between checkpoints; the last step is always saved
    keep: int = 2  # newest checkpoints that are kept


@dataclass
class ValidationConfig:
    every: int = 1000  # steps between validations
    clips: int = 64  # clips of the validation split; 0: all
    bins: int = 5  # timestep bins


@dataclass
class SampleConfig:
    solver: str = "heun"  # euler | heun
    num_inference_steps: int = 30
    guidance_scale: float = 4.0  # classifier-free guidance; 1: none
    size: str = "32x32"  # height x width, pixels
    frames: int = 9
    fps: float = 12.0


@dataclass
class EvaluationConfig:
    prompts: int = 0  # prompts of generated clips that are sampled and read by the detector; 0: no evaluation


@dataclass
class WandbConfig:
    mode: str = "offline"  # offline | online | disabled
    project: str = "megasora"


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    ingest: IngestConfig = field(default_factory=IngestConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    text: TextConfig = field(default_factory=TextConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


def section_type(schema: type, key: str) -> type | None:
    """The dataclass of section `key` of `schema`, or None if the key has a plain value."""
    kind = type(getattr(schema(), key))
    return kind if dataclasses.is_dataclass(kind) else None


def find_section(key: str) -> type | None:
    """The dataclass of the section with this dotted key, or None if there is no such section."""
    schema: type | None = Config
    for name in key.split("."):
        known = schema is not None and name in {f.name for f in dataclasses.fields(schema)}
        schema = section_type(schema, name) if known else None
    return schema


def every_key(schema: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the tree, sections included."""
    keys = []
    for f in dataclasses.fields(schema):
        key = f"{prefix}.{f.name}".strip(".")
        section = section_type(schema, f.name)
        keys += [key, *(every_key(section, key) if section else [])]
    return keys


def differences(new: Config, old: Config, ignore: tuple[str, ...] = ()) -> list[str]:
    """`key: old -> new` for each key in which two configurations differ, except keys and sections in `ignore`."""
    old_tree, new_tree = dataclasses.asdict(old), dataclasses.asdict(new)
    lines = []
    for key in every_key():
        a: Any = old_tree
        b: Any = new_tree
        for part in key.split("."):
            a, b = a[part], b[part]
        if not isinstance(a, dict) and a != b and not any(key == i or key.startswith(i + ".") for i in ignore):
            lines.append(f"{key}: {a} -> {b}")
    return lines


def token_pixels(config: Config) -> tuple[int, int, int]:
    """Frames, rows and columns of pixels that one token covers."""
    t, h, w = (f * p for f, p in zip(config.codec.factors, config.data.patch, strict=True))
    return t, h, w
