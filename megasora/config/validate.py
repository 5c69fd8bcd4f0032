"""Checks of values that need neither data nor a process group: `validate`, and one function per section.

Every message has the key, the numbers, and what the value must be.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any

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
    RunConfig,
    SampleConfig,
    TextConfig,
    TokenDropConfig,
    ValidationConfig,
    WandbConfig,
)
from megasora.errors import MegaSoraError

MAX_WIDTH = 1 << 17
MIN_WORKER_MIB = 512
PROMPTS_MULTIPLE = 16  # 4 colors x 4 directions, see megasora/testing/clips.py
MIN_HEAD_DIM = 6  # 3D RoPE rotates at least one pair of features for each of t, h, w


def validate(config: Config) -> None:
    """Raises MegaSoraError for the first value that is not accepted."""
    for f in dataclasses.fields(config):
        check_finite(f.name, getattr(config, f.name))
    validate_run(config.run)
    validate_codec(config.codec)
    validate_text(config.text)
    validate_data(config.data)
    validate_ingest(config.ingest)
    validate_model(config.model)
    validate_objective(config.objective)
    validate_optim(config.optim)
    validate_parallel(config.parallel)
    validate_checkpoint(config.checkpoint)
    validate_validation(config.validation)
    validate_sample(config.sample)
    validate_evaluation(config.evaluation)
    validate_wandb(config.wandb)


def validate_run(run: RunConfig) -> None:
    one_of("run.device", run.device, ("auto", "cpu", "cuda"))
    one_of("run.dtype", run.dtype, ("auto", "float32", "bfloat16"))
    at_least("run.steps", run.steps, 1)
    if not 0 <= run.seed < 1 << 63:
        raise MegaSoraError(f"run.seed={run.seed} must be from 0 to below 2^63")
    at_least("run.threads", run.threads, 0)
    at_least("run.debug_every", run.debug_every, 1)
    positive("run.hang_seconds", run.hang_seconds)


def validate_codec(codec: CodecConfig) -> None:
    one_of("codec.name", codec.name, ("dct",))
    three_sizes("codec.factors", codec.factors)
    most = 3 * math.prod(codec.factors)
    if codec.name == "dct" and not 3 <= codec.channels <= most:
        raise MegaSoraError(
            f"codec.channels={codec.channels} must be from 3 to 3 x {' x '.join(map(str, codec.factors))} = {most}"
        )


def validate_text(text: TextConfig) -> None:
    one_of("text.name", text.name, ("bytes", "t5", "clip"))
    if text.name != "bytes" and not text.path:
        raise MegaSoraError(f"text.name={text.name} needs text.path, a folder or a hub name of its weights")
    at_least("text.max_tokens", text.max_tokens, 1)
    if text.pad and text.name == "bytes":
        raise MegaSoraError("text.pad=true needs text.name=t5 or clip: bytes has no features to pad; leave it false")


def validate_data(data: DataConfig) -> None:
    three_sizes("data.patch", data.patch)
    if data.patch[0] != 1:
        raise MegaSoraError(f"data.patch={data.patch}: the first must be 1; raise codec.factors[0] for longer tokens")
    for key in ("tokens_per_pack", "packs_per_step", "packing_window", "prefetch_steps"):
        at_least(f"data.{key}", getattr(data, key), 1)
    validate_token_drop(data.token_drop)
    at_least("data.reader_threads", data.reader_threads, 0)
    positive("data.read_timeout_seconds", data.read_timeout_seconds)
    if not 0 <= data.max_damaged_fraction < 1:
        raise MegaSoraError(f"data.max_damaged_fraction={data.max_damaged_fraction} must be from 0 to below 1")
    validate_mixture(data)


def validate_token_drop(drop: TokenDropConfig) -> None:
    for key in ("start", "end"):
        fraction = getattr(drop, key)
        if not 0 <= fraction < 1:
            raise MegaSoraError(
                f"data.token_drop.{key}={fraction} must be from 0 to below 1: the fraction of tokens dropped"
            )
    if not 0 <= drop.epochs < math.inf:
        raise MegaSoraError(f"data.token_drop.epochs={drop.epochs} must be a number, 0 or more")
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
    for folder, weight in zip(data.mixture, data.mixture_weights, strict=True):
        positive(f"data.mixture_weights of {folder}", weight)


def validate_ingest(ingest: IngestConfig) -> None:
    one_of("ingest.missing_caption", ingest.missing_caption, ("error", "skip", "empty"))
    for key in ("max_height", "max_width", "max_frames", "max_clip_mib", "shard_mib", "clips_per_block"):
        at_least(f"ingest.{key}", getattr(ingest, key), 1)
    for key in ("workers", "fit_height", "fit_width", "max_fps", "min_seconds", "max_seconds", "min_motion"):
        at_least(f"ingest.{key}", getattr(ingest, key), 0)
    at_least("ingest.min_contrast", ingest.min_contrast, 0)
    at_least("ingest.worker_memory_mib", ingest.worker_memory_mib, MIN_WORKER_MIB)
    positive("ingest.decode_timeout_seconds", ingest.decode_timeout_seconds)
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
    one_of("model.qk_norm", model.qk_norm, ("per_head", "across_heads", "none"))
    one_of("model.recompute", model.recompute, ("none", "full", "keep_attention"))
    one_of("model.kernel_backend", model.kernel_backend, ("auto", "triton", "torch"))
    one_of("model.attention_backend", model.attention_backend, ("auto", "flash3", "flash2", "varlen", "sdpa", "math"))
    at_least("model.recompute_blocks", model.recompute_blocks, 0)
    if model.recompute_blocks > model.depth:
        raise MegaSoraError(
            f"model.recompute_blocks={model.recompute_blocks} must be at most model.depth={model.depth}"
        )
    for key in ("width", "depth", "heads", "mlp_ratio", "rope_base"):
        positive(f"model.{key}", getattr(model, key))
    factors = model.rope_ntk_factor
    if len(factors) != 3 or any(not math.isfinite(factor) or factor <= 0 for factor in factors):
        raise MegaSoraError(f"model.rope_ntk_factor={factors} must be three positive numbers: time, height, width")
    if model.width > MAX_WIDTH:
        raise MegaSoraError(f"model.width={model.width} must be at most {MAX_WIDTH}")
    at_least("model.text_depth", model.text_depth, 0)
    validate_heads(model)


def validate_heads(model: ModelConfig) -> None:
    width, heads = model.width, model.heads
    if width % heads:
        legal = [n for n in range(1, width + 1) if width % n == 0 and (width // n) % 2 == 0]
        near = sorted(sorted(legal, key=lambda n: abs(n - heads))[:4])
        raise MegaSoraError(f"model.heads={heads} must divide model.width={width}; use {', '.join(map(str, near))}")
    if model.head_dim % 2 or model.head_dim < MIN_HEAD_DIM:
        raise MegaSoraError(
            f"model.width={width} / model.heads={heads} = {model.head_dim}: the head dim must be even, "
            f"at least {MIN_HEAD_DIM} (3D RoPE)"
        )


def validate_objective(objective: ObjectiveConfig) -> None:
    positive("objective.logit_std", objective.logit_std)
    positive("objective.shift", objective.shift)
    at_least("objective.shift_tokens", objective.shift_tokens, 1)
    if not 0 <= objective.caption_dropout < 1:
        raise MegaSoraError(f"objective.caption_dropout={objective.caption_dropout} must be from 0 to below 1")
    validate_frame_conditioning(objective.frame_conditioning)


def validate_frame_conditioning(conditioning: FrameConditioningConfig) -> None:
    weights = dataclasses.asdict(conditioning)
    if not all(0 <= weight < math.inf for weight in weights.values()) or sum(weights.values()) == 0:
        raise MegaSoraError(f"objective.frame_conditioning={weights}: weights are not negative and not all zero")


def validate_optim(optim: OptimConfig) -> None:
    positive("optim.lr", optim.lr)
    positive("optim.max_grad_norm", optim.max_grad_norm)
    positive("optim.eps", optim.eps)
    at_least("optim.warmup_steps", optim.warmup_steps, 0)
    if not 0 <= optim.min_lr_ratio <= 1:
        raise MegaSoraError(f"optim.min_lr_ratio={optim.min_lr_ratio} must be from 0 to 1: the last lr / optim.lr")
    at_least("optim.weight_decay", optim.weight_decay, 0)
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise MegaSoraError(f"optim.betas={optim.betas} must be two numbers from 0 to below 1")
    if not 0 <= optim.ema_decay < 1:
        raise MegaSoraError(f"optim.ema_decay={optim.ema_decay} must be from 0 (no averaging) to below 1")


def validate_parallel(parallel: ParallelConfig) -> None:
    """The sizes of the axes depend on the number of processes: megasora.parallel.layout checks them."""
    one_of("parallel.zero_stage", parallel.zero_stage, (1, 2, 3))
    one_of("parallel.schedule", parallel.schedule, ("1f1b", "interleaved", "zbv"))


def validate_checkpoint(checkpoint: CheckpointConfig) -> None:
    at_least("checkpoint.every", checkpoint.every, 1)
    at_least("checkpoint.keep", checkpoint.keep, 1)


def validate_validation(validation: ValidationConfig) -> None:
    at_least("validation.every", validation.every, 1)
    at_least("validation.clips", validation.clips, 0)
    at_least("validation.bins", validation.bins, 1)


def validate_sample(sample: SampleConfig) -> None:
    one_of("sample.solver", sample.solver, ("euler", "heun"))
    at_least("sample.num_inference_steps", sample.num_inference_steps, 1)
    at_least("sample.frames", sample.frames, 1)
    positive("sample.fps", sample.fps)
    at_least("sample.guidance_scale", sample.guidance_scale, 0)
    parse_size(sample.size, "sample.size")


def validate_evaluation(evaluation: EvaluationConfig) -> None:
    prompts = evaluation.prompts
    if prompts < 0 or prompts % PROMPTS_MULTIPLE:
        raise MegaSoraError(
            f"evaluation.prompts={prompts} must be 0 or a multiple of {PROMPTS_MULTIPLE}, e.g. {3 * PROMPTS_MULTIPLE}"
        )


def validate_wandb(wandb: WandbConfig) -> None:
    one_of("wandb.mode", wandb.mode, ("offline", "online", "disabled"))


def parse_size(text: str, key: str) -> tuple[int, int]:
    """'48x80' -> (height 48, width 80), pixels. Raises MegaSoraError, in which `key` names the setting."""
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise MegaSoraError(f"{key}={text} is not HEIGHTxWIDTH in pixels, e.g. 48x80")
    return int(height), int(width)


def check_finite(name: str, section: Any) -> None:
    """Raises MegaSoraError if a number of the section is infinite or NaN; subsections and lists are not looked at."""
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise MegaSoraError(f"{name}.{f.name}={value} must be a finite number")


def pluralize(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def three_sizes(key: str, values: list[int]) -> None:
    if len(values) != 3 or any(value < 1 for value in values):
        raise MegaSoraError(f"{key}={values} must be three positive integers: frames, height, width")


def one_of(key: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), [str(a) for a in allowed], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise MegaSoraError(f"{key}={value} must be one of {', '.join(map(str, allowed))}{hint}")


def at_least(key: str, value: float, low: float) -> None:
    if not value >= low:
        raise MegaSoraError(f"{key}={value} must be at least {low}")


def positive(key: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise MegaSoraError(f"{key}={value} must be a positive number")
