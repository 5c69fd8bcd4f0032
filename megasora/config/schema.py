"""The configuration tree: one dataclass per section, one comment per key.

All defaults and bounds are here: `bounded(default, low, high)` is a number, or a list of numbers, from `low` to `high`.
`file_path` is a text in which `~` is expanded. `validate.py` checks values, `load.py` reads YAML and overrides.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from megasora.config.field_rules import above, below, bounded, file_path


@dataclass
class RunConfig:
    dir: str = file_path("runs/default")  # run folder: everything that the run writes
    seed: int = bounded(0, 0, (1 << 63) - 1)  # of weights, data order, noise, timesteps and dropout
    steps: int = bounded(100_000, 1, 10**9)  # optimizer steps
    start: str = file_path("resume-or-fresh", after="init:")  # or resume, resume:step-XXXXXXXX, fresh, init:WEIGHTS
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "auto"  # auto | float32 | bfloat16; auto: bfloat16 on a GPU, float32 on a CPU
    threads: int = bounded(0, 0, 1024)  # CPU threads of torch per process; 0: cores / processes
    debug_parallel: bool = True  # compare hashes of the tensors that must be equal on several ranks
    debug_every: int = bounded(100, 1, 10**9)  # steps between two such comparisons; the first is step 1
    hang_seconds: float = bounded(540.0, above(0), 10**7)  # without a heartbeat for this long, the watchdog aborts
    ledger: bool = False  # log the sample ids of each step


@dataclass
class CodecConfig:
    """With `path`, factors and channels are those of the codec there; leave them out."""

    name: str = "dct"  # dct | vae: of megasora.train_codec | pretrained: wan, ..., see docs/codec.md
    path: str = file_path("")  # of its weights: run folder of megasora.train_codec, folder, or hub name
    factors: list[int] = bounded([4, 8, 8], 1, 64)  # frames, rows, columns of pixels per latent
    channels: int = bounded(48, 1, 100_000)  # dct: coefficients kept of 3 * product(factors), lowest frequencies first
    tile: list[int] = bounded([512, 512], 0, 1 << 16)  # rows, columns of pixels encoded or decoded at once; 0: all
    tile_overlap: int = bounded(64, 0, 1 << 12)  # pixels that neighbouring tiles share, blended
    chunk_frames: int = bounded(16, 1, 1 << 20)  # frames encoded or decoded at once; changes no latent
    device: str = "auto"  # auto | cpu | cuda: of a learned codec in ingest and `megasora codec`


@dataclass
class VAEConfig:
    """The network of codec.name=vae; codec.factors and codec.channels give its strides and latent channels."""

    kind: str = "kl"  # kl | vq | fsq
    time: str = "causal"  # causal: 3D convolutions | none: each frame is encoded by itself
    patch: int = bounded(1, 1, 8)  # side of the blocks of pixels that become channels before the first convolution
    width: int = bounded(96, 4, 4096)  # channels of the first stage
    decoder_width: int = bounded(0, 0, 4096)  # channels of the decoder's last stage; 0: width
    multipliers: list[int] = bounded([1, 2, 4, 4], 1, 64)  # channels of each stage / width; a stage halves the sides
    blocks: int = bounded(2, 1, 64)  # residual blocks of a stage; the decoder has one more
    codebook_size: int = bounded(1024, 2, 1 << 20)  # vq: number of codes
    codebook_decay: float = bounded(0.99, 0, below(1))  # vq: of the moving averages of the codes, per step
    dead_code_usage: float = bounded(0.01, 0, 1)  # vq: a code used less often than this fraction of the mean restarts
    fsq_levels: list[int] = bounded([8, 8, 8, 5, 5, 5], 2, 64)  # fsq: levels of each latent channel


@dataclass
class AdversarialConfig:
    """A 3D PatchGAN discriminator with hinge loss."""

    weight: float = bounded(0.0, 0, 1000)  # times the adaptive weight; 0: none
    start_step: int = bounded(50_000, 0, 10**9)  # first step with the adversarial loss
    width: int = bounded(64, 4, 1024)  # channels of the discriminator's first layer
    layers: int = bounded(3, 1, 8)  # of the discriminator that halve the sides


@dataclass
class ReconstructionConfig:
    """The loss of megasora.train_codec: weights of its terms, each a mean over the pixels, latents or codes."""

    train: str = "all"  # all | decoder: the encoder is that of codec.path and stays as it is
    l1: float = bounded(1.0, 0, 1000)
    mse: float = bounded(0.0, 0, 1000)  # mean squared error; learns small shapes earlier than l1
    gradient: float = bounded(1.0, 0, 1000)  # L1 of the differences of neighbouring pixels, at several scales
    ssim: float = bounded(0.1, 0, 1000)  # 1 - SSIM
    lpips: float = bounded(0.0, 0, 1000)  # needs lpips_path
    lpips_path: str = file_path("")  # VGG16 and linear weights of LPIPS, .safetensors
    kl: float = bounded(1e-6, 0, 1000)
    commitment: float = bounded(0.25, 0, 1000)  # vq
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)


@dataclass
class TextConfig:
    name: str = "bytes"  # bytes | t5 | clip
    path: str = file_path("")  # of the t5 or clip weights: folder or hub name
    max_tokens: int = bounded(64, 1, 100_000)  # of a caption; a longer one is an error, it is never truncated
    pad: bool = False  # t5, clip: pad the features with zeros to max_tokens and attend to the padding (Wan)


@dataclass
class TokenDropConfig:
    """Fraction of each training clip's tokens that is dropped (patch n' pack), linear in the epoch."""

    start: float = bounded(0.0, 0, below(1))  # fraction at epoch 0; start = end = 0: no dropping
    end: float = bounded(0.0, 0, below(1))  # fraction from epoch `epochs` on
    epochs: float = bounded(0.0, 0, 10**9)  # length of the linear schedule


@dataclass
class DataConfig:
    shards: str = file_path("")  # folder written by `megasora ingest`
    mixture: list[str] = file_path([])  # several such folders, in place of `shards`
    mixture_weights: list[float] = bounded([], above(0), 10**9)  # relative sampling weight of each folder
    patch: list[int] = bounded([1, 1, 1], 1, 64)  # latents per token: frames, rows, columns
    tokens_per_pack: int = bounded(4096, 1, 1 << 24)  # length of one micro-batch
    packs_per_step: int = bounded(8, 1, 10**6)  # packs per optimizer step, over all data ranks
    packing_window: int = bounded(262_144, 1, 10**9)  # clips of an epoch packed together; more: better balance
    split_long: bool = False  # split clips longer than a pack in time; false: such a clip is an error
    token_drop: TokenDropConfig = field(default_factory=TokenDropConfig)
    prefetch_steps: int = bounded(2, 1, 1000)  # steps that are read ahead
    reader_threads: int = bounded(4, 0, 1024)  # reader threads; 0: the prefetch thread reads the clips itself
    read_timeout_seconds: float = bounded(300.0, above(0), 10**7)  # a read of one clip that takes longer ends the run
    max_damaged_fraction: float = bounded(0.0, 0, below(1))  # tolerated fraction of damaged, skipped clips; 0: none
    clips: str = file_path("")  # megasora.train_codec: clips as `megasora ingest` reads them
    clips_per_pack: int = bounded(8, 1, 1 << 16)  # megasora.train_codec: clips of one micro-batch
    crop: list[int] = bounded([0, 0, 0], 0, 1 << 20)  # megasora.train_codec: frames, rows, columns; 0: all
    image_fraction: float = bounded(0.0, 0, 1)  # megasora.train_codec: of the videos, of which one frame is taken
    clip_cache_mib: int = bounded(1024, 0, 1 << 24)  # megasora.train_codec: decoded clips kept in memory, per process


@dataclass
class IngestConfig:
    missing_caption: str = "error"  # error | skip | empty
    max_height: int = bounded(4320, 1, 1 << 16)  # pixels; a larger clip is rejected
    max_width: int = bounded(7680, 1, 1 << 16)  # pixels
    max_frames: int = bounded(7200, 1, 10**8)
    max_clip_mib: int = bounded(65_536, 1, 1 << 24)  # MiB of all decoded frames of a clip, 3 bytes per pixel
    worker_memory_mib: int = bounded(4096, 512, 1 << 24)  # address space of a decode worker, not of a codec process
    decode_timeout_seconds: float = bounded(1800.0, above(0), 10**7)  # per clip, without the network of its codec
    shard_mib: int = bounded(256, 1, 1 << 20)  # a shard is closed when it reaches this size
    clips_per_block: int = bounded(1024, 1, 10**6)  # consecutive clips per ingest block, which is written atomically
    workers: int = bounded(0, 0, 1024)  # decode workers; 0: one per core
    codec_processes: int = bounded(0, 0, 1024)  # of a codec with weights; 0: one per GPU, without GPUs one per core
    fit_height: int = bounded(0, 0, 1 << 16)  # pixels; larger clips are scaled down, aspect ratio kept; 0: no limit
    fit_width: int = bounded(0, 0, 1 << 16)  # pixels
    max_fps: float = bounded(0.0, 0, 10_000)  # frames are skipped to bring faster clips down to this rate; 0: no limit
    min_seconds: float = bounded(0.0, 0, 10**7)  # shorter videos are rejected; images are not
    max_seconds: float = bounded(0.0, 0, 10**7)  # longer videos are rejected; 0: no limit
    min_motion: float = bounded(0.0, 0, 255)  # mean change between frames, grey levels of 255; less: rejected
    min_contrast: float = bounded(0.0, 0, 255)  # mean standard deviation within a frame, grey levels; less: rejected
    record_quality: bool = False  # write motion, contrast and brightness to meta.json even without a limit
    scores: list[str] = field(default_factory=list)  # module:function, see megasora/ingest/filters.py


@dataclass
class ModelConfig:
    width: int = bounded(384, 1, 1 << 17)  # hidden size
    depth: int = bounded(12, 1, 1024)  # transformer blocks
    heads: int = bounded(6, 1, 4096)  # attention heads
    mlp_ratio: float = bounded(4.0, above(0), 64)  # hidden features of the MLP / width
    modulation: str = "block"  # block: one projection per block (DiT); shared: one, and a table per block (PixArt, Wan)
    conditioning: str = "full"  # full: timestep, native size, pooled caption, first frame, null token | timestep (Wan)
    qk_norm: str = "per_head"  # RMSNorm of q and k: per_head | across_heads (Wan) | none
    rope_base: float = bounded(10_000.0, 1, 10**12)
    rope_ntk_factor: list[float] = bounded([1.0, 1.0, 1.0], 0.001, 1000)  # t, h, w: new / trained clip size
    kernel_backend: str = "auto"  # auto | triton | torch; auto: triton on a GPU, torch on a CPU
    attention_backend: str = "auto"  # flash4 | flash3 | cudnn | flash2 | varlen | sdpa | math; auto: the fastest here
    deterministic: bool = True  # attention sums in a fixed order: runs repeat bitwise; false: faster on GPUs
    compile: bool = False  # torch.compile of each block, instead of the kernels: needs kernel_backend=torch
    fp8_recipe: str = "none"  # FP8 products of the blocks' linears: none | tensorwise | rowwise | rowwise_with_gw_hp
    text_depth: int = bounded(1, 0, 256)  # transformer blocks over the text tokens
    recompute: str = "none"  # activations recomputed in backward: none | full | keep_attention: all but attention's
    recompute_blocks: int = bounded(0, 0, 1024)  # number of blocks that recompute, evenly spaced; 0: all

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

    none: float = bounded(0.6, 0, 10**9)  # no frame
    first: float = bounded(0.15, 0, 10**9)  # the first frame
    last: float = bounded(0.05, 0, 10**9)  # the last frame
    head: float = bounded(0.08, 0, 10**9)  # the first k frames, k random
    tail: float = bounded(0.06, 0, 10**9)  # the last k frames
    both: float = bounded(0.06, 0, 10**9)  # k frames, divided between both ends


@dataclass
class ObjectiveConfig:
    logit_mean: float = bounded(0.0, -20, 20)  # mean of the logit-normal distribution of t
    logit_std: float = bounded(1.0, above(0), 20)  # its standard deviation
    shift: float = bounded(1.0, above(0), 1000)  # t' = a t / (1 + (a - 1) t), a = shift sqrt(tokens / shift_tokens)
    shift_tokens: int = bounded(256, 1, 10**9)  # clip length in tokens at which a = shift; a is at least 1
    caption_dropout: float = bounded(0.1, 0, below(1))  # probability that a caption is replaced by the null token
    frame_conditioning: FrameConditioningConfig = field(default_factory=FrameConditioningConfig)


@dataclass
class SpikeConfig:
    """A loss far above the last ones, see megasora/optim/step_guard.py."""

    threshold: float = bounded(0.0, 0, 10**6)  # deviations above the median of the last losses; 0: spikes are applied
    window: int = bounded(128, 2, 100_000)  # number of last losses
    patience: int = bounded(5, 1, 10_000)  # spikes in a row at which the run rolls back, to before them
    max_rollbacks: int = bounded(3, 0, 10_000)  # of a run; the next one ends it


@dataclass
class OptimConfig:
    name: str = "adamw"  # adamw | muon, whose matrices have orthogonalised steps, all other parameters AdamW's
    lr: float = bounded(1e-4, above(0), 100)  # peak learning rate
    muon_momentum: float = bounded(0.95, 0, below(1))  # of its matrices
    betas: list[float] = bounded([0.9, 0.99], 0, below(1))  # adamw
    eps: float = bounded(1e-8, above(0), 1)  # adamw
    weight_decay: float = bounded(0.01, 0, 100)
    warmup_steps: int = bounded(1000, 0, 10**9)  # linear from 0 to lr
    min_lr_ratio: float = bounded(0.05, 0, 1)  # lr at the end of the cosine / lr
    max_grad_norm: float = bounded(1.0, above(0), 10**12)  # clips the global gradient norm
    ema_decay: float = bounded(0.9999, 0, below(1))  # per step; 0: no averaging
    ema_decays: list[float] = bounded([], above(0), below(1))  # of more averages, 4 bytes per weight each
    ema_sigmas: list[float] = bounded([], 0.001, 0.25)  # relative widths of power-function averages, e.g. [0.05, 0.1]
    max_skipped_steps: int = bounded(10, 1, 10**6)  # steps in a row that are not finite, at which the run ends
    spike: SpikeConfig = field(default_factory=SpikeConfig)


@dataclass
class ParallelConfig:
    """Sizes of the mesh axes; the data axis has the remaining processes."""

    tensor: int = bounded(1, 1, 1 << 16)  # ranks that share each weight matrix and, between matrices, the tokens
    context: int = bounded(1, 1, 1 << 16)  # ranks that share the tokens of a pack
    ulysses: int = bounded(1, 1, 1 << 16)  # part of context: ranks that exchange heads; the others form the ring
    rows: int = bounded(1, 1, 1 << 16)  # megasora.train_codec: part of context: ranks that share the rows of a frame
    pipeline: int = bounded(1, 1, 1 << 16)  # ranks that share the blocks
    schedule: str = "1f1b"  # 1f1b | interleaved | zbv (zero bubble, V-shaped)
    stages_per_rank: int = bounded(1, 1, 1024)  # interleaved: stages per pipeline rank; zbv has 2
    zero_stage: int = bounded(0, 0, 3)  # sharded: 1: optimizer states; 2: gradients; 3: weights; 0: 2 on GPUs, else 1
    symmetric_memory: bool = False  # tensor-parallel products copy from the memory of other GPUs of the node (NVLink)


@dataclass
class NodeCheckpointConfig:
    """Checkpoints on the disks of the nodes, besides those in run.dir."""

    dir: str = file_path("")  # a folder on the node's own disk, e.g. /local_nvme; empty: none
    every: int = bounded(100, 1, 10**9)  # steps between them
    keep: int = bounded(1, 1, 1000)  # newest that are kept
    copy: bool = True  # each node also has a copy of those of the node before it


@dataclass
class CheckpointConfig:
    every: int = bounded(1000, 1, 10**9)  # steps between checkpoints; the last step is always saved
    keep: int = bounded(2, 1, 10**6)  # newest checkpoints that are kept
    keep_every: int = bounded(0, 0, 10**9)  # checkpoints at multiples of so many steps are never deleted; 0: none
    keep_best: int = bounded(0, 0, 10**6)  # checkpoints of the lowest validation losses that are kept besides
    asynchronous: bool = True  # training goes on while a checkpoint is written, from a copy in host memory
    when_busy: str = "wait"  # if the one before is still being written: wait | skip
    node: NodeCheckpointConfig = field(default_factory=NodeCheckpointConfig)


@dataclass
class ValidationConfig:
    every: int = bounded(1000, 1, 10**9)  # steps between validations
    clips: int = bounded(64, 0, 10**9)  # clips of the validation split; 0: all
    bins: int = bounded(5, 1, 1000)  # timestep bins


@dataclass
class SampleConfig:
    solver: str = "heun"  # euler | heun | dpmpp_2m | unipc; heun calls the model twice per step, the others once
    num_inference_steps: int = bounded(30, 1, 10_000)
    guidance_scale: float = bounded(4.0, 0, 1000)  # classifier-free guidance; 1: none
    context_guidance_scale: float = bounded(1.0, 0, 1000)  # the same towards the clean frames; 1: none
    guidance_interval: list[float] = bounded([0.0, 1.0], 0, 1)  # timesteps with guidance; outside the scales are 1
    guidance_rescale: float = bounded(0.0, 0, 1)  # 1: a guided velocity has the std of the conditional one
    unconditional: str = "null_token"  # of guidance: null_token: as objective.caption_dropout trains | negative_prompt
    negative_prompt: str = ""  # unconditional=negative_prompt: the caption to move away from; empty as for Wan
    size: str = "32x32"  # height x width, pixels
    frames: int = bounded(9, 1, 10**6)
    fps: float = bounded(12.0, above(0), 10_000)
    window_frames: int = bounded(0, 0, 10**6)  # of the windows of a longer clip; 0: of the longest training clip
    context_frames: int = bounded(0, 0, 10**6)  # given to a window of those before it; 0: a third of the window
    rope: str = "none"  # for clips larger than those trained on: none | ntk: all axes | riflex: time only
    refine: float = bounded(0.5, 0, 1)  # level of a second pass where given frames follow free ones; 0: none
    expand: str = file_path("none")  # short prompts into captions: none | template | folder of an instruction model
    watermark: bool = True  # an invisible mark in frames that megasora sample makes; not in those of given videos
    every: int = bounded(0, 0, 10**9)  # training: steps between samples of `prompts`; 0: no samples
    prompts: list[str] = field(default_factory=list)  # of the samples during training, each a caption as it is


@dataclass
class EvaluationConfig:
    prompts: int = bounded(0, 0, 10**6)  # sampled and read by the detector; 0: no evaluation


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
    vae: VAEConfig = field(default_factory=VAEConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
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
