"""Checks of values that need neither data nor a process group: the bounds of schema.py, and what bounds cannot say.

Every message has the key, the numbers, and what the value must be.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from typing import Any

from megasora.config.field_rules import BOUNDS
from megasora.config.schema import (
    CheckpointConfig,
    CodecConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    FrameConditioningConfig,
    IngestConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    ReconstructionConfig,
    RunConfig,
    SampleConfig,
    TextConfig,
    TokenDropConfig,
    WandbConfig,
)
from megasora.errors import MegaSoraError, printable

MAX_WEIGHTS = 10**13
PRETRAINED_CODECS = ("wan", "hunyuan", "cogvideox", "ltx", "dc_ae", "sd")  # see megasora/codec/pretrained_table.py
START = re.compile(r"resume-or-fresh|resume(:step-\d{8,12})?|fresh|init:.+", re.ASCII)
MAX_SHOWN = 60  # characters of a value in a message
SIZE = re.compile(r"0*([1-9][0-9]{0,4})x0*([1-9][0-9]{0,4})", re.IGNORECASE)
PROMPTS_MULTIPLE = 16  # 4 colors x 4 directions, see megasora/testing/clips.py
MIN_HEAD_DIM = 6  # 3D RoPE rotates at least one pair of features for each of t, h, w


def validate(config: Config) -> None:
    """Raises MegaSoraError for the first value that is not accepted."""
    check_bounds(config)
    validate_run(config.run)
    validate_codec(config.codec)
    validate_vae(config)
    validate_reconstruction(config.reconstruction)
    validate_text(config.text)
    validate_data(config.data)
    validate_ingest(config.ingest)
    validate_model(config.model)
    validate_conditioning(config.model, config.text)
    validate_objective(config.objective)
    validate_optim(config.optim)
    validate_parallel(config.parallel)
    validate_checkpoint(config.checkpoint)
    validate_sample(config.sample)
    validate_evaluation(config.evaluation)
    validate_wandb(config.wandb)


def validate_run(run: RunConfig) -> None:
    one_of("run.device", run.device, ("auto", "cpu", "cuda"))
    one_of("run.dtype", run.dtype, ("auto", "float32", "bfloat16"))
    if not START.fullmatch(run.start):
        raise MegaSoraError(
            f"run.start={run.start} must be resume-or-fresh, resume, resume:step-XXXXXXXX, fresh, or init:PATH"
        )
    if not run.dir.strip() or not run.dir.strip("/"):
        raise MegaSoraError(f"run.dir={run.dir} is no folder of a run; give a new one, e.g. runs/demo")


def validate_codec(codec: CodecConfig) -> None:
    one_of("codec.name", codec.name, ("dct", "vae", *PRETRAINED_CODECS))
    one_of("codec.device", codec.device, ("auto", "cpu", "cuda"))
    three_sizes("codec.factors", codec.factors)
    if len(codec.tile) != 2:
        raise MegaSoraError(f"codec.tile={codec.tile} must be two whole numbers: rows, columns of pixels")
    if codec.name in PRETRAINED_CODECS and not codec.path:
        raise MegaSoraError(f"codec.name={codec.name} needs codec.path, a folder or a hub name of its weights")
    most = 3 * math.prod(codec.factors)
    if codec.name == "dct" and not 3 <= codec.channels <= most:
        raise MegaSoraError(
            f"codec.channels={codec.channels} must be from 3 to 3 x {' x '.join(map(str, codec.factors))} = {most}"
        )


def validate_vae(config: Config) -> None:
    """The network of codec.name=vae; its strides are those of codec.factors."""
    vae, factors, channels = config.vae, config.codec.factors, config.codec.channels
    one_of("vae.kind", vae.kind, ("kl", "vq", "fsq"))
    one_of("vae.time", vae.time, ("causal", "none"))
    one_of("vae.patch", vae.patch, (1, 2, 4, 8))
    if config.codec.name != "vae":
        return
    one_of("codec.factors[0]", factors[0], (1, 2, 4, 8))
    one_of("codec.factors[1]", factors[1], (4, 8, 16, 32))
    if factors[1] != factors[2]:
        raise MegaSoraError(f"codec.factors={factors}: rows and columns of codec.name=vae must have one factor")
    if vae.time == "none" and factors[0] != 1:
        raise MegaSoraError(f"vae.time=none encodes each frame by itself: codec.factors={factors} must begin with 1")
    if not 4 <= channels <= 128:
        raise MegaSoraError(f"codec.channels={channels} of codec.name=vae must be from 4 to 128")
    if config.codec.path:  # the network is that of codec.json there
        return
    stages = (factors[1] // vae.patch).bit_length()
    if vae.patch > factors[1] or len(vae.multipliers) != stages:
        raise MegaSoraError(
            f"vae.multipliers={vae.multipliers} must have one entry per stage: codec.factors[1]={factors[1]} / "
            f"vae.patch={vae.patch} makes {max(stages, 1)} stages, each but the last halving the sides"
        )
    if vae.kind == "fsq" and len(vae.fsq_levels) != channels:
        raise MegaSoraError(
            f"vae.fsq_levels={vae.fsq_levels} must have a number of levels for each of codec.channels={channels}"
        )


def validate_reconstruction(reconstruction: ReconstructionConfig) -> None:
    one_of("reconstruction.train", reconstruction.train, ("all", "decoder"))
    if reconstruction.lpips and not reconstruction.lpips_path:
        raise MegaSoraError(
            f"reconstruction.lpips={reconstruction.lpips} needs reconstruction.lpips_path, the weights of LPIPS; or "
            "set reconstruction.lpips=0: the gradient and ssim terms need no weights"
        )
    terms = ("l1", "mse", "gradient", "ssim", "lpips")
    if not any(getattr(reconstruction, term) for term in terms):
        raise MegaSoraError(f"reconstruction: {', '.join(terms)} must not all be 0")


def validate_text(text: TextConfig) -> None:
    one_of("text.name", text.name, ("bytes", "t5", "clip"))
    if text.name != "bytes" and not text.path:
        raise MegaSoraError(f"text.name={text.name} needs text.path, a folder or a hub name of its weights")
    if text.pad and text.name == "bytes":
        raise MegaSoraError("text.pad=true needs text.name=t5 or clip: bytes has no features to pad; leave it false")


def validate_data(data: DataConfig) -> None:
    three_sizes("data.patch", data.patch)
    if data.patch[0] != 1:
        raise MegaSoraError(f"data.patch={data.patch}: the first must be 1; raise codec.factors[0] for longer tokens")
    three_sizes("data.crop", data.crop)
    validate_token_drop(data.token_drop)
    validate_mixture(data)


def validate_token_drop(drop: TokenDropConfig) -> None:
    if drop.start != drop.end and drop.epochs == 0:
        raise MegaSoraError(
            f"data.token_drop.start={drop.start} and data.token_drop.end={drop.end} differ: set "
            "data.token_drop.epochs, the length of the schedule from one to the other"
        )


def validate_mixture(data: DataConfig) -> None:
    if data.shards and data.mixture:
        raise MegaSoraError(
            f"data.shards={data.shards} and data.mixture={data.mixture} are both set; name all folders in data.mixture"
        )
    if len(data.mixture_weights) != len(data.mixture):
        raise MegaSoraError(
            f"data.mixture={data.mixture} has {pluralize(len(data.mixture), 'folder')}, "
            f"data.mixture_weights={data.mixture_weights} {pluralize(len(data.mixture_weights), 'weight')}; "
            "give one weight per folder"
        )
    for folder in data.mixture:
        if data.mixture.count(folder) > 1:
            raise MegaSoraError(f"data.mixture={data.mixture}: {folder} occurs twice; name it once and add its weights")


def validate_ingest(ingest: IngestConfig) -> None:
    one_of("ingest.missing_caption", ingest.missing_caption, ("error", "skip", "empty"))
    if 0 < ingest.max_seconds < ingest.min_seconds:
        raise MegaSoraError(
            f"ingest.max_seconds={ingest.max_seconds} must be at least ingest.min_seconds={ingest.min_seconds}, "
            "or 0 for no limit"
        )
    for name in ingest.scores:
        module, colon, function = name.partition(":")
        if not (colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
            raise MegaSoraError(f"ingest.scores={ingest.scores}: '{name}' is not of the form module:function")


def validate_model(model: ModelConfig) -> None:
    one_of("model.modulation", model.modulation, ("block", "shared"))
    one_of("model.conditioning", model.conditioning, ("full", "timestep"))
    one_of("model.qk_norm", model.qk_norm, ("per_head", "across_heads", "none"))
    one_of("model.recompute", model.recompute, ("none", "full", "keep_attention"))
    one_of("model.kernel_backend", model.kernel_backend, ("auto", "triton", "torch"))
    one_of("model.fp8_recipe", model.fp8_recipe, ("none", "tensorwise", "rowwise", "rowwise_with_gw_hp"))
    one_of(
        "model.attention_backend",
        model.attention_backend,
        ("auto", "flash4", "flash3", "cudnn", "flash2", "varlen", "sdpa", "math"),
    )
    if model.attention_backend == "cudnn" and model.deterministic:
        raise MegaSoraError(
            "model.attention_backend=cudnn sums gradients in an order that differs between runs: "
            "set model.deterministic=false, or use model.attention_backend=auto"
        )
    validate_compile(model)
    if model.recompute_blocks and model.recompute == "none":
        raise MegaSoraError(
            f"model.recompute_blocks={model.recompute_blocks} has no effect with model.recompute=none; "
            "use 0, or model.recompute=full or keep_attention"
        )
    if model.recompute_blocks > model.depth:
        raise MegaSoraError(
            f"model.recompute_blocks={model.recompute_blocks} must be at most model.depth={model.depth}"
        )
    if len(model.rope_ntk_factor) != 3:
        raise MegaSoraError(f"model.rope_ntk_factor={model.rope_ntk_factor} must be three numbers: time, height, width")
    validate_size(model)
    validate_heads(model)


def validate_compile(model: ModelConfig) -> None:
    if not model.compile:
        return
    if model.kernel_backend != "torch":
        raise MegaSoraError(
            f"model.compile=true needs model.kernel_backend=torch, not {model.kernel_backend}: a compiler cannot see "
            "into Triton kernels, and compiles again for each pack around them; use model.compile=false with them"
        )
    if model.fp8_recipe != "none":
        raise MegaSoraError(
            f"model.compile=true cannot be combined with model.fp8_recipe={model.fp8_recipe}: its products are "
            "operators that a compiler does not see into; use model.compile=false or model.fp8_recipe=none"
        )


def validate_conditioning(model: ModelConfig, text: TextConfig) -> None:
    if model.conditioning == "timestep" and text.name == "bytes":
        raise MegaSoraError(
            "model.conditioning=timestep has no null token: a hidden caption is one of zero features, which "
            "text.name=bytes has not; use text.name=t5 or clip, or model.conditioning=full"
        )


def validate_size(model: ModelConfig) -> None:
    """An MLP has a hidden feature; a rough count of the weights, before any of them is allocated."""
    if model.mlp_hidden < 1:
        raise MegaSoraError(
            f"model.mlp_ratio={model.mlp_ratio} x model.width={model.width} is less than 1, the hidden features of an "
            "MLP; use a larger ratio, e.g. 4"
        )
    weights = round(model.depth * model.width**2 * (8 + 2 * model.mlp_ratio))
    if weights > MAX_WEIGHTS:
        raise MegaSoraError(
            f"model.width={model.width}, model.depth={model.depth} and model.mlp_ratio={model.mlp_ratio} make "
            f"about {weights:.1e} weights; at most {MAX_WEIGHTS:.0e}"
        )


def validate_heads(model: ModelConfig) -> None:
    width, heads = model.width, model.heads
    if width % heads:
        legal = [n for n in range(1, width // MIN_HEAD_DIM + 1) if width % n == 0 and (width // n) % 2 == 0]
        near = sorted(sorted(legal, key=lambda n: abs(n - heads))[:4])
        use = ", ".join(map(str, near)) or "an even width, a multiple of 32 for speed"
        raise MegaSoraError(f"model.heads={heads} must divide model.width={width}; use {use}")
    if model.head_dim % 2 or model.head_dim < MIN_HEAD_DIM:
        raise MegaSoraError(
            f"model.width={width} / model.heads={heads} = {model.head_dim}: the head dim must be even, "
            f"at least {MIN_HEAD_DIM} (3D RoPE)"
        )


def validate_objective(objective: ObjectiveConfig) -> None:
    validate_frame_conditioning(objective.frame_conditioning)


def validate_frame_conditioning(conditioning: FrameConditioningConfig) -> None:
    weights = dataclasses.asdict(conditioning)
    if sum(weights.values()) == 0:
        raise MegaSoraError(f"objective.frame_conditioning={weights}: the weights must not all be zero")


def validate_optim(optim: OptimConfig) -> None:
    one_of("optim.name", optim.name, ("adamw", "muon"))
    if len(optim.betas) != 2:
        raise MegaSoraError(f"optim.betas={optim.betas} must be two numbers")
    if optim.ema_decay in optim.ema_decays:
        raise MegaSoraError(f"optim.ema_decays={optim.ema_decays} has optim.ema_decay={optim.ema_decay}; leave it out")
    for key in ("ema_decays", "ema_sigmas"):
        values = getattr(optim, key)
        if len(set(values)) < len(values):
            raise MegaSoraError(f"optim.{key}={values}: a value occurs twice; name it once")


def validate_parallel(parallel: ParallelConfig) -> None:
    """The sizes of the axes depend on the number of processes: megasora.parallel.layout checks them."""
    one_of("parallel.schedule", parallel.schedule, ("1f1b", "interleaved", "zbv"))


def validate_checkpoint(checkpoint: CheckpointConfig) -> None:
    one_of("checkpoint.when_busy", checkpoint.when_busy, ("wait", "skip"))
    if checkpoint.node.dir and checkpoint.node.every >= checkpoint.every:
        raise MegaSoraError(
            f"checkpoint.node.every={checkpoint.node.every} must be less than checkpoint.every={checkpoint.every}: the "
            "disks of the nodes have what is newer than the checkpoints of the run folder"
        )


def validate_sample(sample: SampleConfig) -> None:
    one_of("sample.solver", sample.solver, ("euler", "heun", "dpmpp_2m", "unipc"))
    one_of("sample.rope", sample.rope, ("none", "ntk", "riflex"))
    interval = sample.guidance_interval
    if len(interval) != 2 or interval[0] > interval[1]:
        raise MegaSoraError(
            f"sample.guidance_interval={interval} must be two timesteps, the lower first, e.g. [0.2, 0.9]"
        )
    one_of("sample.unconditional", sample.unconditional, ("null_token", "negative_prompt"))
    if sample.negative_prompt and sample.unconditional != "negative_prompt":
        raise MegaSoraError(
            "sample.negative_prompt is set, but unused: also set sample.unconditional=negative_prompt, or leave it out"
        )
    parse_size(sample.size, "sample.size")
    if sample.every and not sample.prompts:
        raise MegaSoraError(
            f"sample.every={sample.every} without prompts; give some, e.g. sample.prompts=['a red circle moves right']"
        )
    for i, prompt in enumerate(sample.prompts):
        if not prompt.strip():
            raise MegaSoraError(f"sample.prompts[{i}] is empty; describe a clip, or leave it out")


def validate_evaluation(evaluation: EvaluationConfig) -> None:
    prompts = evaluation.prompts
    if prompts % PROMPTS_MULTIPLE:
        raise MegaSoraError(
            f"evaluation.prompts={prompts} must be 0 or a multiple of {PROMPTS_MULTIPLE}, e.g. {3 * PROMPTS_MULTIPLE}"
        )


def validate_wandb(wandb: WandbConfig) -> None:
    one_of("wandb.mode", wandb.mode, ("offline", "online", "disabled"))


def parse_size(text: str, key: str) -> tuple[int, int]:
    """'48x80' -> (height 48, width 80), pixels. Raises MegaSoraError, in which `key` names the setting."""
    size = SIZE.fullmatch(text)
    if not size:
        raise MegaSoraError(f"{key}={printable(text, MAX_SHOWN)} is not HEIGHTxWIDTH in pixels, e.g. 48x80")
    return int(size[1]), int(size[2])


def check_bounds(section: Any, prefix: str = "") -> None:
    """Raises MegaSoraError for the first number that is not within the bounds of its field, lists included."""
    for f in dataclasses.fields(section):
        key, value = f"{prefix}{f.name}", getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{key}.")
        elif bounds := f.metadata.get(BOUNDS):
            items = {f"{key}[{i}]": item for i, item in enumerate(value)} if isinstance(value, list) else {key: value}
            for name, number in items.items():
                if not bounds.contain(number):
                    raise MegaSoraError(f"{name}={number} must be {bounds}")


def pluralize(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def three_sizes(key: str, values: list[int]) -> None:
    if len(values) != 3:
        raise MegaSoraError(f"{key}={values} must be three whole numbers: frames, height, width")


def one_of(key: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), [str(a) for a in allowed], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise MegaSoraError(f"{key}={value} must be one of {', '.join(map(str, allowed))}{hint}")
