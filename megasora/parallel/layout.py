"""Which layouts there are: every refusal, with its numbers and the nearest remedy, before a weight is allocated."""

from __future__ import annotations

from math import gcd

from megasora.config import Config
from megasora.errors import MegaSoraError
from megasora.parallel.pipeline import check_microbatches, num_stages


def check_layout(config: Config, processes: int) -> None:
    """Raises MegaSoraError where `processes` cannot be arranged as `parallel` says, or the model not be cut so."""
    p = config.parallel
    for key in ("tensor", "context", "ulysses", "pipeline", "stages_per_rank"):
        if getattr(p, key) < 1:
            raise MegaSoraError(f"parallel.{key}={getattr(p, key)} must be at least 1")
    product = p.pipeline * p.context * p.tensor
    if processes % product:
        raise MegaSoraError(
            f"parallel.pipeline={p.pipeline} x parallel.context={p.context} x parallel.tensor={p.tensor} = {product} "
            f"must divide the {processes} processes; start {multiples(product, processes)} processes or change one of "
            "them"
        )
    check_width(config)
    check_context(config)
    check_depth(config)
    data = processes // product
    packs = config.data.packs_per_step
    if packs % data:
        raise MegaSoraError(
            f"data.packs_per_step={packs} must be a multiple of the {data} data-parallel ranks ({processes} processes "
            f"/ {product}); use {multiples(data, packs)}"
        )
    if p.pipeline > 1:
        check_microbatches(p.schedule, p.pipeline, packs, data)
    if p.zero_stage > 1 and p.pipeline > 1:
        raise MegaSoraError(
            f"parallel.zero_stage={p.zero_stage} cannot be combined with parallel.pipeline={p.pipeline}: a pipeline "
            "reduces gradients once, after all packs of a step; use parallel.zero_stage=1 or parallel.pipeline=1"
        )


def check_width(config: Config) -> None:
    """Heads and hidden numbers of an MLP are dealt over the tensor axis."""
    tensor, m = config.parallel.tensor, config.model
    hidden = int(m.width * m.mlp_ratio)
    legal = choices(gcd(m.heads, hidden), tensor)
    if m.heads % tensor:
        raise MegaSoraError(f"parallel.tensor={tensor} must divide model.heads={m.heads}; use {legal}")
    if hidden % tensor:
        raise MegaSoraError(
            f"parallel.tensor={tensor} must divide the {hidden} hidden numbers of an MLP (model.width={m.width} x "
            f"model.mlp_ratio={m.mlp_ratio}); use {legal}, or another ratio"
        )


def check_context(config: Config) -> None:
    """Ulysses deals the heads of a tensor rank over its part of the context axis; a pack has tokens for all ranks."""
    p, heads = config.parallel, config.model.heads // config.parallel.tensor
    if p.context % p.ulysses or heads % p.ulysses:
        of_heads = f"model.heads={config.model.heads}"
        if p.tensor > 1:
            of_heads += f" / parallel.tensor={p.tensor} = {heads}"
        raise MegaSoraError(
            f"parallel.ulysses={p.ulysses} must divide parallel.context={p.context} and {of_heads}; "
            f"use {choices(gcd(p.context, heads), p.ulysses)}; 1 is a ring, for any context and heads"
        )
    tokens, ranks = config.data.tokens_per_pack, p.context * p.tensor
    if tokens < ranks:
        raise MegaSoraError(
            f"data.tokens_per_pack={tokens} is less than the parallel.context={p.context} x parallel.tensor={p.tensor} "
            f"= {ranks} ranks that would share a pack; use at least {ranks}, or fewer ranks"
        )


def check_depth(config: Config) -> None:
    """Blocks are dealt over stages."""
    p, m = config.parallel, config.model
    if p.schedule == "interleaved" and p.pipeline > 1 and p.stages_per_rank < 2:
        raise MegaSoraError(
            f"parallel.schedule=interleaved with parallel.stages_per_rank={p.stages_per_rank}: interleaving needs 2 or "
            "more stages a rank; use 2, or parallel.schedule=1f1b"
        )
    if p.schedule != "interleaved" and p.stages_per_rank != 1:
        raise MegaSoraError(
            f"parallel.stages_per_rank={p.stages_per_rank} is for parallel.schedule=interleaved, not {p.schedule}; "
            "use 1"
        )
    stages = num_stages(p.schedule, p.pipeline, p.stages_per_rank) if p.pipeline > 1 else 1
    if m.depth % stages:
        on_each = stages // p.pipeline
        fewer = f", or parallel.pipeline={choices(m.depth // on_each, p.pipeline)}" if m.depth % on_each == 0 else ""
        raise MegaSoraError(
            f"model.depth={m.depth} blocks cannot be dealt evenly to {stages} stages, {on_each} on each rank of "
            f"parallel.pipeline={p.pipeline} (parallel.schedule={p.schedule}); use model.depth="
            f"{multiples(stages, m.depth)}{fewer}"
        )


def choices(number: int, wanted: int) -> str:
    """The divisors of a number, those nearest to what was asked for."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    near = sorted(sorted(divisors, key=lambda n: abs(n - wanted))[:4])
    return f"{', '.join(map(str, near[:-1]))} or {near[-1]}" if len(near) > 1 else str(near[0])


def multiples(number: int, wanted: int) -> str:
    """The multiples of a number next to what was asked for."""
    below = wanted // number * number
    return f"{below} or {below + number}" if below else str(number)
