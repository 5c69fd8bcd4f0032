"""Validates the layout: an error gives the numbers and the nearest legal values, before any weight is allocated."""

from __future__ import annotations

from math import gcd

from megasora.config import Config, ParallelConfig
from megasora.errors import MegaSoraError
from megasora.kernels.float8 import MULTIPLE as FP8_MULTIPLE
from megasora.parallel.pipeline import check_microbatches, num_stages


def resolve_zero_stage(parallel: ParallelConfig, device_type: str) -> int:
    """The ZeRO stage of a run on "cpu" or "cuda": parallel.zero_stage; for 0 it is 2 on GPUs, else 1.

    On GPUs whole fp32 gradients on every rank cost memory, and their sum over the ranks has to wait for the last pack.
    A pipeline sums gradients once, after all packs of a step, so it has stage 1.
    """
    if parallel.zero_stage:
        return parallel.zero_stage
    return 2 if device_type == "cuda" and parallel.pipeline == 1 else 1


def check_layout(config: Config, processes: int) -> None:
    """Raises MegaSoraError if `processes`, the model or the packs of a step cannot be divided as `parallel` says."""
    p = config.parallel
    data = check_sampling_layout(config, processes)
    packs = check_packs(config, data, processes)
    check_optimizer(config)
    check_compile(config)
    if p.pipeline > 1:
        check_microbatches(p.schedule, p.pipeline, packs, data)
    if p.zero_stage > 1 and p.pipeline > 1:
        raise MegaSoraError(
            f"parallel.zero_stage={p.zero_stage} cannot be combined with parallel.pipeline={p.pipeline}: a pipeline "
            "reduces gradients once, after all packs of a step; use parallel.zero_stage=1 or parallel.pipeline=1"
        )


def check_sampling_layout(config: Config, processes: int) -> int:
    """The same without an optimizer and the packs of a step. Returns the number of data-parallel ranks."""
    check_sizes(config)
    if config.parallel.rows > 1:
        raise MegaSoraError(
            f"parallel.rows={config.parallel.rows} divides the frames of a codec and is for megasora.train_codec; use "
            "1, and parallel.context or parallel.ulysses for a DiT"
        )
    data = data_axis_size(config, processes)
    check_tensor_axis(config)
    check_fp8_sizes(config)
    check_context_axis(config)
    check_pipeline_axis(config)
    return data


def check_compile(config: Config) -> None:
    """Raises MegaSoraError for layouts whose blocks do what a compiler cannot trace."""
    p = config.parallel
    reasons = {
        f"parallel.tensor={p.tensor}": p.tensor > 1 and "a block's matrices communicate while they compute",
        f"parallel.pipeline={p.pipeline}": p.pipeline > 1 and "its schedules keep several packs in a block at once",
        "parallel.zero_stage=3": p.zero_stage == 3 and "the weights of a block are gathered while it runs",
    }
    reason = next((f"{key}: {reason}" for key, reason in reasons.items() if reason), None)
    if config.model.compile and reason is not None:
        raise MegaSoraError(
            f"model.compile=true cannot be combined with {reason}; use model.compile=false, or data and context "
            "parallelism with ZeRO 1 or 2"
        )


def check_codec_layout(config: Config, processes: int) -> None:
    """The same for a codec: `context` divides the clips in time, and in rows where `rows` is a part of it."""
    check_sizes(config)
    p = config.parallel
    for key, what in (
        ("tensor", "matrices"),
        ("pipeline", "blocks"),
        ("ulysses", "heads"),
        ("stages_per_rank", "blocks"),
    ):
        if getattr(p, key) != 1:
            raise MegaSoraError(
                f"parallel.{key}={getattr(p, key)} divides the {what} of a DiT and is not for megasora.train_codec; "
                "use 1, and parallel.context and parallel.rows to divide long or large clips"
            )
    if p.symmetric_memory:
        raise MegaSoraError(
            "parallel.symmetric_memory=true is for the matrices of a DiT and not for megasora.train_codec; use false"
        )
    if p.context % p.rows:
        raise MegaSoraError(
            f"parallel.rows={p.rows} must divide parallel.context={p.context}; use "
            f"{nearest_divisors(p.context, p.rows)}; 1 divides clips in time only"
        )
    check_packs(config, data_axis_size(config, processes), processes)
    check_optimizer(config)
    check_crop(config)


def check_crop(config: Config) -> None:
    """Crops have at least one latent frame for each rank that shares them in time, and one latent row for each rank
    that shares their rows: shorter clips are computed by one rank, and here none would be longer."""
    p, (ft, fh, _) = config.parallel, config.codec.factors
    frames, height, _ = config.data.crop
    time = p.context // p.rows
    latent_frames, latent_rows = 1 + -(-(frames - 1) // ft), -(-height // fh)
    if frames and latent_frames < time:
        raise MegaSoraError(
            f"data.crop={config.data.crop} makes clips of {latent_frames} latent frames, fewer than the "
            f"parallel.context={p.context} / parallel.rows={p.rows} = {time} ranks that would share them; use at least "
            f"{2 + (time - 2) * ft} frames, or fewer ranks"
        )
    if height and latent_rows < p.rows:
        raise MegaSoraError(
            f"data.crop={config.data.crop} makes clips of {latent_rows} latent rows, fewer than the "
            f"parallel.rows={p.rows} ranks that would share them; use at least {(p.rows - 1) * fh + 1} rows, or fewer "
            "ranks"
        )


def check_sizes(config: Config) -> None:
    for key in ("tensor", "context", "ulysses", "rows", "pipeline", "stages_per_rank"):
        if getattr(config.parallel, key) < 1:
            raise MegaSoraError(f"parallel.{key}={getattr(config.parallel, key)} must be at least 1")


def data_axis_size(config: Config, processes: int) -> int:
    """The number of data-parallel ranks."""
    p = config.parallel
    product = p.pipeline * p.context * p.tensor
    if processes % product:
        raise MegaSoraError(
            f"parallel.pipeline={p.pipeline} x parallel.context={p.context} x parallel.tensor={p.tensor} = {product} "
            f"must divide the {processes} processes; start {nearest_multiples(product, processes)} processes or change "
            "one of them"
        )
    return processes // product


def check_packs(config: Config, data: int, processes: int) -> int:
    """The packs of a step, a multiple of the data axis."""
    packs = config.data.packs_per_step
    if packs % data:
        raise MegaSoraError(
            f"data.packs_per_step={packs} must be a multiple of the {data} data-parallel ranks ({processes} processes "
            f"/ {processes // data}); use {nearest_multiples(data, packs)}"
        )
    return packs


def check_optimizer(config: Config) -> None:
    """Muon needs whole matrices: it gathers what ZeRO 1 and 2 divide, but not what the tensor axis or ZeRO 3 does."""
    p = config.parallel
    if config.optim.name != "muon":
        return
    if p.tensor > 1:
        raise MegaSoraError(
            f"optim.name=muon needs whole matrices, and parallel.tensor={p.tensor} divides each over {p.tensor} ranks; "
            "use parallel.tensor=1 with parallel.context or parallel.pipeline, or optim.name=adamw"
        )
    if p.zero_stage == 3:
        raise MegaSoraError(
            "optim.name=muon needs whole matrices, and parallel.zero_stage=3 divides each over the data and context "
            "ranks; use parallel.zero_stage=1 or 2, or optim.name=adamw"
        )


def check_tensor_axis(config: Config) -> None:
    """The tensor axis shards the heads and the hidden features of the MLPs evenly."""
    tensor, m = config.parallel.tensor, config.model
    hidden = m.mlp_hidden
    legal = nearest_divisors(gcd(m.heads, hidden), tensor)
    if m.heads % tensor:
        raise MegaSoraError(f"parallel.tensor={tensor} must divide model.heads={m.heads}; use {legal}")
    if hidden % tensor:
        raise MegaSoraError(
            f"parallel.tensor={tensor} must divide the {hidden} hidden features of an MLP (model.width={m.width} x "
            f"model.mlp_ratio={m.mlp_ratio}); use {legal}, or another ratio"
        )


def check_fp8_sizes(config: Config) -> None:
    """FP8 products take multiples of 16 features, of a whole vector and of a tensor rank's part of it."""
    tensor, m = config.parallel.tensor, config.model
    if m.fp8_recipe == "none":
        return
    legal = FP8_MULTIPLE * tensor
    for what, features in (
        (f"model.width={m.width}", m.width),
        (f"model.width={m.width} x model.mlp_ratio={m.mlp_ratio} = {m.mlp_hidden}", m.mlp_hidden),
    ):
        if features % legal:
            per_rank = f" on each of parallel.tensor={tensor} ranks" if tensor > 1 else ""
            raise MegaSoraError(
                f"model.fp8_recipe={m.fp8_recipe} needs multiples of {FP8_MULTIPLE} features{per_rank}, so {what} must "
                f"be a multiple of {legal}; use {nearest_multiples(legal, features)}, or model.fp8_recipe=none"
            )


def check_context_axis(config: Config) -> None:
    """Ulysses divides the heads of a tensor rank evenly; a pack has at least one token for each rank that shares it."""
    p, heads = config.parallel, config.model.heads // config.parallel.tensor
    if p.context % p.ulysses or heads % p.ulysses:
        local_heads = f"model.heads={config.model.heads}"
        if p.tensor > 1:
            local_heads += f" / parallel.tensor={p.tensor} = {heads}"
        raise MegaSoraError(
            f"parallel.ulysses={p.ulysses} must divide parallel.context={p.context} and {local_heads}; "
            f"use {nearest_divisors(gcd(p.context, heads), p.ulysses)}; 1 is a ring, for any context and heads"
        )
    tokens, ranks = config.data.tokens_per_pack, p.context * p.tensor
    if tokens < ranks:
        raise MegaSoraError(
            f"data.tokens_per_pack={tokens} is less than the parallel.context={p.context} x parallel.tensor={p.tensor} "
            f"= {ranks} ranks that would share a pack; use at least {ranks}, or fewer ranks"
        )


def check_pipeline_axis(config: Config) -> None:
    """The stages have equally many blocks, and the schedule fits the number of stages per rank."""
    p, m = config.parallel, config.model
    if p.schedule == "interleaved" and p.pipeline > 1 and p.stages_per_rank < 2:
        raise MegaSoraError(
            f"parallel.schedule=interleaved with parallel.stages_per_rank={p.stages_per_rank}: interleaving needs 2 or "
            "more stages per rank; use 2, or parallel.schedule=1f1b"
        )
    if p.schedule != "interleaved" and p.stages_per_rank != 1:
        raise MegaSoraError(
            f"parallel.stages_per_rank={p.stages_per_rank} is for parallel.schedule=interleaved, not {p.schedule}; "
            "use 1"
        )
    stages = num_stages(p.schedule, p.pipeline, p.stages_per_rank) if p.pipeline > 1 else 1
    if m.depth % stages:
        per_rank = stages // p.pipeline
        ranks = nearest_divisors(m.depth // per_rank, p.pipeline) if m.depth % per_rank == 0 else ""
        fewer = f", or parallel.pipeline={ranks}" if ranks else ""
        raise MegaSoraError(
            f"model.depth={m.depth} blocks cannot be divided evenly into {stages} stages, {per_rank} on each rank of "
            f"parallel.pipeline={p.pipeline} (parallel.schedule={p.schedule}); use model.depth="
            f"{nearest_multiples(stages, m.depth)}{fewer}"
        )


def nearest_divisors(number: int, target: int) -> str:
    """The (at most four) divisors of `number` that are nearest to `target`, e.g. "1, 2 or 4"."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    nearest = sorted(sorted(divisors, key=lambda n: abs(n - target))[:4])
    return f"{', '.join(map(str, nearest[:-1]))} or {nearest[-1]}" if len(nearest) > 1 else str(nearest[0])


def nearest_multiples(number: int, target: int) -> str:
    """The multiples of `number` next to `target`, e.g. "4 or 8"."""
    below = target // number * number
    return f"{below} or {below + number}" if below else str(number)
