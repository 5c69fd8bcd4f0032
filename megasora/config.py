"""Every setting of a run, as one tree of dataclasses.

A YAML file states only what differs from these defaults; `key.path=value` overrides come on top; `load` returns
plain dataclasses, checked. Nothing outside this file holds a default, and nothing is read from the environment.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megasora.errors import MegaSoraError

MAX_YAML_BYTES = 1 << 20
MAX_WIDTH = 1 << 17


@dataclass
class RunConfig:
    dir: str = "runs/default"  # everything that the run writes goes here
    seed: int = 0  # weights, order of the data, noise, timesteps, dropout
    steps: int = 100_000  # optimizer steps
    device: str = "auto"  # auto | cpu | cuda
    dtype: str = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    threads: int = 0  # CPU threads of torch in a process; 0: cores / processes
    debug_parallel: bool = False  # compare, by hashes, what ranks must have in common
    debug_every: int = 100  # steps between two such comparisons; the first is at step 0
    hang_seconds: float = 540.0  # a run that has not moved for so long is ended: a step, a save, a validation
    ledger: bool = False  # write down which clips each step was trained on


@dataclass
class CodecConfig:
    name: str = "dct"
    factors: list[int] = field(default_factory=lambda: [4, 8, 8])  # frames, pixels, pixels of one latent
    channels: int = 48  # coefficients kept of 3 * product(factors), lowest frequencies first


@dataclass
class TextConfig:
    name: str = "bytes"  # bytes | t5 | clip
    path: str = ""  # t5, clip: a folder or a hub name
    max_tokens: int = 64  # longest caption; a longer one is refused, never cut
    pad: bool = False  # t5, clip: features are filled up with zeros to max_tokens, all of which are attended to (Wan)


@dataclass
class DropConfig:
    """The fraction of each training clip's tokens that is left out (patch n' pack); it moves in a straight line."""

    start: float = 0.0  # at the start; 0 here and at the end: nothing is left out
    end: float = 0.0  # after `epochs` epochs, and from then on
    epochs: float = 0.0


@dataclass
class DataConfig:
    shards: str = ""  # folder written by `megasora ingest`
    mixture: list[str] = field(default_factory=list)  # instead of it: several such folders ...
    weights: list[float] = field(default_factory=list)  # ... and how often clips of each are seen, relatively
    patch: list[int] = field(default_factory=lambda: [1, 1, 1])  # latents in a token: frames, rows, columns
    tokens_per_pack: int = 4096  # static length of one micro-batch
    packs_per_step: int = 8  # packs of all data-parallel ranks in one optimizer step
    lookahead: int = 262_144  # clips of an epoch's order that are packed together; more are better balanced
    split_long: bool = False  # a clip longer than a pack is split in time; false: it is refused
    drop: DropConfig = field(default_factory=DropConfig)
    prefetch: int = 2  # steps read ahead
    threads: int = 4  # that wait for clips side by side; 0: the one that reads ahead does
    timeout: float = 300.0  # seconds after which the reading of a clip is given up
    max_bad_fraction: float = 0.0  # damaged clips are left out until they are more of all than this; 0: none may be


@dataclass
class IngestConfig:
    missing_caption: str = "error"  # error | skip | empty
    max_height: int = 4320  # pixels
    max_width: int = 7680  # pixels
    max_frames: int = 7200
    max_clip_mib: int = 65_536  # of all decoded frames, 3 bytes a pixel
    memory_mib: int = 4096  # address space of a process that decodes
    seconds: float = 1800.0  # that a clip may take to decode
    shard_mib: int = 256  # a shard is closed when it reaches this size
    clips_per_block: int = 1024  # consecutive clips that one process writes, complete or not at all
    workers: int = 0  # processes that decode side by side; 0: one a core
    fit_height: int = 0  # pixels; larger clips are scaled down to fit, in their aspect; 0: none is
    fit_width: int = 0
    fps: float = 0.0  # faster clips are brought down to this rate by leaving frames out; 0: none is
    min_seconds: float = 0.0  # shorter videos are left out; images are not
    max_seconds: float = 0.0  # longer videos are left out; 0: none
    min_motion: float = 0.0  # mean change between frames, grey levels of 255; stiller videos are left out
    min_contrast: float = 0.0  # mean standard deviation within a frame, grey levels; blank and black clips are left out
    measure: bool = False  # motion, contrast and brightness into meta.json, also where no limit is set
    scores: list[str] = field(default_factory=list)  # module:function, see megasora/ingest/stages.py


@dataclass
class ModelConfig:
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    modulation: str = "block"  # block: a projection in each block (DiT); shared: one and a table a block (PixArt, Wan)
    weights: str = ""  # to start from: safetensors of a whole model, or a checkpoint; empty: megasora.model.init
    qk_norm: str = "head"  # head: RMSNorm of each head; width: of all heads together (Wan); none
    rope_base: float = 10_000.0
    rope_scale: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])  # of t, h, w: clips over those trained on
    kernels: str = "auto"  # auto: triton on a GPU, torch on a CPU | triton | torch
    attention: str = "auto"  # the first that can: flash3 | flash2 | varlen | sdpa | plain
    deterministic: bool = True  # attention adds up in one order: a run repeats bit by bit; false: faster on GPUs
    text_depth: int = 1  # self-attention blocks over the text tokens
    recompute: str = "none"  # in the backward pass: none | full: a block's activations | attention: all but attention's
    recompute_blocks: int = 0  # how many blocks do so, evenly spread; 0: all


@dataclass
class ConditionConfig:
    """How often which latent frames of a training clip are given clean; relative weights."""

    none: float = 0.6
    first: float = 0.15
    last: float = 0.05
    head: float = 0.08  # the first k frames, k drawn
    tail: float = 0.06
    both: float = 0.06  # k frames at either end


@dataclass
class ObjectiveConfig:
    timestep_mean: float = 0.0  # logit-normal
    timestep_std: float = 1.0
    shift: float = 1.0  # t' = a t / (1 + (a - 1) t), a = shift * sqrt(tokens / shift_tokens), at least 1
    shift_tokens: int = 256
    caption_dropout: float = 0.1
    condition: ConditionConfig = field(default_factory=ConditionConfig)


@dataclass
class OptimConfig:
    rate: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup: int = 1000  # steps from 0 to rate
    final_rate: float = 0.05  # the cosine ends at this fraction of rate
    clip: float = 1.0  # global gradient norm
    ema: float = 0.9999  # decay of the averaged weights, per step


@dataclass
class ParallelConfig:
    """Sizes of the mesh axes; the data axis is what they leave of the processes."""

    tensor: int = 1  # ranks that share every matrix and, between matrices, the tokens
    context: int = 1  # ranks that share the tokens of a pack
    ulysses: int = 1  # of the context ranks, how many exchange heads for tokens; the others pass keys in a ring
    pipeline: int = 1  # ranks that share the blocks
    schedule: str = "1f1b"  # 1f1b | interleaved | zbv (zero bubble, V-shaped)
    stages_per_rank: int = 1  # interleaved: stages that a pipeline rank holds; zbv has 2
    zero_stage: int = 1  # sharded over data x context: 1 optimizer states, 2 gradients too, 3 weights too


@dataclass
class CheckpointConfig:
    every: int = 1000  # steps; the last step is always saved
    keep: int = 2  # newest checkpoints kept


@dataclass
class ValidationConfig:
    every: int = 1000  # steps
    clips: int = 64  # of the held-out split; 0: all
    bins: int = 5  # timestep bins


@dataclass
class SampleConfig:
    solver: str = "heun"  # euler | heun
    steps: int = 30
    guidance: float = 4.0
    size: str = "32x32"  # height x width, pixels
    frames: int = 9
    fps: float = 12.0


@dataclass
class EvaluationConfig:
    prompts: int = 0  # rendered-clip prompts sampled and read back by the detector; 0: none


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


def load(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Defaults, then the YAML file at `path`, then `key.path=value` overrides; checked by `validate`.

    Raises MegaSoraError that names the key and the nearest valid one, or the value and what it must be.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    layers: list[tuple[str, dict]] = []
    if path is not None:
        layers.append((str(path), read_yaml(Path(path))))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise MegaSoraError(f"override '{text}' is not of the form key.path=value, e.g. run.steps=100")
        refuse_aliases(value, f"override '{text}'")
        layers.append((f"override '{text}'", OmegaConf.to_container(OmegaConf.from_dotlist([text]))))

    tree = OmegaConf.structured(Config)
    for source, values in layers:
        refuse_unknown_keys(values, Config, source)
        try:
            tree = OmegaConf.merge(tree, values)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise MegaSoraError(f"{source}: {getattr(error, 'full_key', None) or ''}: {reason}") from None
        except TypeError:  # key[0]=value on a list
            raise MegaSoraError(f"{source}: give a list as a whole, e.g. optim.betas=[0.9,0.99]") from None
    try:
        config: Config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:  # ${name} of nothing
        raise MegaSoraError(f"{getattr(error, 'full_key', None) or ''}: {str(error).splitlines()[0]}") from None
    validate(config)
    return config


def read_yaml(path: Path) -> dict:
    """The mapping in a YAML file; size limited, aliases refused."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise MegaSoraError(f"no configuration file {path}{hint}")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise MegaSoraError(f"{path} has {path.stat().st_size} bytes; a configuration has at most {MAX_YAML_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise MegaSoraError(f"{path} is not UTF-8 text: {error}") from None
    refuse_aliases(text, str(path))
    try:
        values = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else {}
    except (yaml.YAMLError, OmegaConfBaseException) as error:  # a key given twice, an object's tag
        raise MegaSoraError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise MegaSoraError(f"{path} holds a {type(values).__name__}; a configuration is a mapping of sections")
    return values


def refuse_aliases(text: str, source: str) -> None:
    """A few bytes of YAML aliases expand to gigabytes; text that is no YAML at all is refused here too."""
    import yaml

    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise MegaSoraError(f"{source}: YAML aliases (*name) are not accepted; write the value out")
        yaml.compose(text)
    except yaml.YAMLError as error:
        raise MegaSoraError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None


def refuse_unknown_keys(values: Any, schema: type, source: str, prefix: str = "") -> None:
    known = {f.name: f for f in dataclasses.fields(schema)}
    if not isinstance(values, dict):
        raise MegaSoraError(
            f"{source}: {prefix or 'the file'} is a section; give {prefix}.<key>, one of {', '.join(known)}"
        )
    for key, value in values.items():
        if key not in known:
            full = [name for name in every_key(Config) if name != prefix]
            near = difflib.get_close_matches(f"{prefix}.{key}".strip("."), full, 1, 0.5)
            leaf = [k for k in full if k.rsplit(".", 1)[-1] == str(key)]
            hint = (leaf or near or [None])[0]
            raise MegaSoraError(
                f"{source}: unknown key '{f'{prefix}.{key}'.strip('.')}'"
                + (f"; did you mean '{hint}'?" if hint else f"; known keys: {', '.join(known)}")
            )
        section = section_type(schema, key)
        if section is not None:
            refuse_unknown_keys(value, section, source, f"{prefix}.{key}".strip("."))


def section_type(schema: type, key: str) -> type | None:
    """The dataclass of a section, or None where the key holds a plain value."""
    kind = type(getattr(schema(), key))
    return kind if dataclasses.is_dataclass(kind) else None


def every_key(schema: type, prefix: str = "") -> list[str]:
    """Every dotted key of the tree, sections included."""
    keys = []
    for f in dataclasses.fields(schema):
        full = f"{prefix}.{f.name}".strip(".")
        section = section_type(schema, f.name)
        keys += [full, *(every_key(section, full) if section else [])]
    return keys


def to_yaml(config: Config) -> str:
    """The whole resolved tree, as saved in the run folder."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(ours: Config, theirs: Config, ignore: tuple[str, ...] = ()) -> list[str]:
    """`key: theirs -> ours` for each key in which two configurations differ."""
    left, right = dataclasses.asdict(theirs), dataclasses.asdict(ours)
    lines = []
    for key in every_key(Config):
        a: Any = left
        b: Any = right
        for part in key.split("."):
            a, b = a[part], b[part]
        if not isinstance(a, dict) and a != b and not any(key == i or key.startswith(i + ".") for i in ignore):
            lines.append(f"{key}: {a} -> {b}")
    return lines


def parse_size(text: str, key: str) -> tuple[int, int]:
    """'48x80' -> (height 48, width 80), pixels."""
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise MegaSoraError(f"{key}={text} is not HEIGHTxWIDTH in pixels, e.g. 48x80")
    return int(height), int(width)


def token_pixels(config: Config) -> tuple[int, int, int]:
    """Frames, rows and columns of pixels that one token covers."""
    t, h, w = (f * p for f, p in zip(config.codec.factors, config.data.patch, strict=True))
    return t, h, w


def validate(config: Config) -> None:
    """Every check that needs no data and no process group; the message has the key, the numbers and the remedy."""
    m, d, c, o = config.model, config.data, config.codec, config.objective
    one_of("run.device", config.run.device, ("auto", "cpu", "cuda"))
    one_of("run.dtype", config.run.dtype, ("auto", "float32", "bfloat16"))
    one_of("codec.name", c.name, ("dct",))
    one_of("text.name", config.text.name, ("bytes", "t5", "clip"))
    one_of("ingest.missing_caption", config.ingest.missing_caption, ("error", "skip", "empty"))
    one_of("model.modulation", m.modulation, ("block", "shared"))
    one_of("model.qk_norm", m.qk_norm, ("head", "width", "none"))
    one_of("model.recompute", m.recompute, ("none", "full", "attention"))
    one_of("model.kernels", m.kernels, ("auto", "triton", "torch"))
    one_of("model.attention", m.attention, ("auto", "flash3", "flash2", "varlen", "sdpa", "plain"))
    one_of("sample.solver", config.sample.solver, ("euler", "heun"))
    one_of("wandb.mode", config.wandb.mode, ("offline", "online", "disabled"))
    one_of("parallel.zero_stage", config.parallel.zero_stage, (1, 2, 3))
    one_of("parallel.schedule", config.parallel.schedule, ("1f1b", "interleaved", "zbv"))

    for key, values in (("codec.factors", c.factors), ("data.patch", d.patch)):
        if len(values) != 3 or any(v < 1 for v in values):
            raise MegaSoraError(f"{key}={values} must be three positive integers: frames, height, width")
    most = 3 * c.factors[0] * c.factors[1] * c.factors[2]
    if c.name == "dct" and not 3 <= c.channels <= most:
        raise MegaSoraError(
            f"codec.channels={c.channels} must be from 3 to 3 x {' x '.join(map(str, c.factors))} = {most}"
        )
    if d.patch[0] != 1:
        raise MegaSoraError(f"data.patch={d.patch}: the first must be 1; raise codec.factors[0] for longer tokens")

    for section in (
        config.run,
        d,
        config.ingest,
        m,
        o,
        config.optim,
        config.checkpoint,
        config.validation,
        config.sample,
    ):
        for f in dataclasses.fields(section):
            value = getattr(section, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                name = type(section).__name__.removesuffix("Config").lower()
                raise MegaSoraError(f"{name}.{f.name}={value} must be a finite number")
    at_least("run.steps", config.run.steps, 1)
    if not 0 <= config.run.seed < 1 << 63:
        raise MegaSoraError(f"run.seed={config.run.seed} must be from 0 to below 2^63")
    at_least("run.threads", config.run.threads, 0)
    at_least("run.debug_every", config.run.debug_every, 1)
    positive("run.hang_seconds", config.run.hang_seconds)
    at_least("model.recompute_blocks", m.recompute_blocks, 0)
    if m.recompute_blocks > m.depth:
        raise MegaSoraError(f"model.recompute_blocks={m.recompute_blocks} must be at most model.depth={m.depth}")
    for key in ("width", "depth", "heads", "mlp_ratio", "rope_base"):
        positive(f"model.{key}", getattr(m, key))
    if len(m.rope_scale) != 3 or any(not math.isfinite(s) or s <= 0 for s in m.rope_scale):
        raise MegaSoraError(f"model.rope_scale={m.rope_scale} must be three positive numbers: time, height, width")
    if m.width > MAX_WIDTH:
        raise MegaSoraError(f"model.width={m.width} must be at most {MAX_WIDTH}")
    at_least("model.text_depth", m.text_depth, 0)
    for key in ("tokens_per_pack", "packs_per_step", "lookahead", "prefetch"):
        at_least(f"data.{key}", getattr(d, key), 1)
    for key, rate in (("start", d.drop.start), ("end", d.drop.end)):
        if not 0 <= rate < 1:
            raise MegaSoraError(f"data.drop.{key}={rate} must be from 0 to below 1: the fraction of tokens left out")
    if not 0 <= d.drop.epochs < math.inf:
        raise MegaSoraError(f"data.drop.epochs={d.drop.epochs} must be a number, 0 or more")
    if d.drop.start != d.drop.end and d.drop.epochs == 0:
        raise MegaSoraError(
            f"data.drop.start={d.drop.start} and data.drop.end={d.drop.end} differ: set data.drop.epochs, "
            "in which the rate goes from one to the other"
        )
    at_least("data.threads", d.threads, 0)
    positive("data.timeout", d.timeout)
    if not 0 <= d.max_bad_fraction < 1:
        raise MegaSoraError(f"data.max_bad_fraction={d.max_bad_fraction} must be from 0 to below 1")
    if d.shards and d.mixture:
        raise MegaSoraError(
            f"data.shards={d.shards} and data.mixture={d.mixture} are both set; name all folders in data.mixture"
        )
    if len(d.weights) != len(d.mixture) or len(set(d.mixture)) != len(d.mixture):
        raise MegaSoraError(
            f"data.weights={d.weights} must be one number for each of data.mixture={d.mixture}, none twice"
        )
    for folder, weight in zip(d.mixture, d.weights, strict=True):
        positive(f"data.weights of {folder}", weight)
    for key in ("max_height", "max_width", "max_frames", "max_clip_mib", "shard_mib", "clips_per_block"):
        at_least(f"ingest.{key}", getattr(config.ingest, key), 1)
    for key in ("workers", "fit_height", "fit_width", "fps"):
        at_least(f"ingest.{key}", getattr(config.ingest, key), 0)
    for key in ("min_seconds", "max_seconds", "min_motion", "min_contrast"):
        at_least(f"ingest.{key}", getattr(config.ingest, key), 0)
    at_least("ingest.memory_mib", config.ingest.memory_mib, 512)
    positive("ingest.seconds", config.ingest.seconds)
    if 0 < config.ingest.max_seconds < config.ingest.min_seconds:
        raise MegaSoraError(
            f"ingest.max_seconds={config.ingest.max_seconds} must be at least "
            f"ingest.min_seconds={config.ingest.min_seconds}, or 0 for no limit"
        )
    for name in config.ingest.scores:
        module, colon, function = name.partition(":")
        if not (colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
            raise MegaSoraError(f"ingest.scores={config.ingest.scores}: '{name}' is not of the form module:function")
    if m.width % m.heads:
        legal = [n for n in range(1, m.width + 1) if m.width % n == 0 and (m.width // n) % 2 == 0]
        near = sorted(sorted(legal, key=lambda n: abs(n - m.heads))[:4])
        raise MegaSoraError(f"model.heads={m.heads} must divide model.width={m.width}; use {', '.join(map(str, near))}")
    head = m.width // m.heads
    if head % 2 or head < 6:
        raise MegaSoraError(
            f"model.width={m.width} / model.heads={m.heads} = {head}: the head dim must be even, at least 6 (3D RoPE)"
        )
    for key in ("timestep_std", "shift"):
        positive(f"objective.{key}", getattr(o, key))
    at_least("objective.shift_tokens", o.shift_tokens, 1)
    if not 0 <= o.caption_dropout < 1:
        raise MegaSoraError(f"objective.caption_dropout={o.caption_dropout} must be from 0 to below 1")
    weights = dataclasses.asdict(o.condition)
    if not all(0 <= w < float("inf") for w in weights.values()) or sum(weights.values()) == 0:
        raise MegaSoraError(f"objective.condition={weights}: weights are not negative and not all zero")
    optim = config.optim
    positive("optim.rate", optim.rate)
    positive("optim.clip", optim.clip)
    positive("optim.eps", optim.eps)
    at_least("optim.warmup", optim.warmup, 0)
    at_least("optim.weight_decay", optim.weight_decay, 0)
    if len(optim.betas) != 2 or not all(0 <= b < 1 for b in optim.betas):
        raise MegaSoraError(f"optim.betas={optim.betas} must be two numbers from 0 to below 1")
    if not 0 <= optim.ema < 1:
        raise MegaSoraError(f"optim.ema={optim.ema} must be from 0 (no averaging) to below 1")
    at_least("checkpoint.every", config.checkpoint.every, 1)
    at_least("checkpoint.keep", config.checkpoint.keep, 1)
    at_least("validation.every", config.validation.every, 1)
    at_least("validation.clips", config.validation.clips, 0)
    at_least("validation.bins", config.validation.bins, 1)
    at_least("sample.steps", config.sample.steps, 1)
    at_least("sample.frames", config.sample.frames, 1)
    positive("sample.fps", config.sample.fps)
    at_least("sample.guidance", config.sample.guidance, 0)
    at_least("evaluation.prompts", config.evaluation.prompts, 0)
    parse_size(config.sample.size, "sample.size")
    if config.text.name != "bytes" and not config.text.path:
        raise MegaSoraError(f"text.name={config.text.name} needs text.path, a folder or a hub name of its weights")
    at_least("text.max_tokens", config.text.max_tokens, 1)
    if config.text.pad and config.text.name == "bytes":
        raise MegaSoraError(
            "text.pad=true needs text.name=t5 or clip: bytes has no features to fill up; leave it false"
        )


def one_of(key: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), [str(a) for a in allowed], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise MegaSoraError(f"{key}={value} must be one of {', '.join(map(str, allowed))}{hint}")


def at_least(key: str, value: float, low: float) -> None:
    if not value >= low:
        raise MegaSoraError(f"{key}={value} must be at least {low}")


def positive(key: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise MegaSoraError(f"{key}={value} must be a positive number")
