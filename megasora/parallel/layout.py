"""Which layouts there are: every refusal, with its numbers and the nearest remedy, before a weight is allocated."""

from __future__ import annotations

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
        more = -(-processes // product) * product
        fewer = f"{processes // product * product} or " if processes > product else ""
        raise MegaSoraError(
            f"parallel.pipeline={p.pipeline} x parallel.context={p.context} x parallel.tensor={p.tensor} = {product} "
            f"must divide the {processes} processes; start {fewer}{more} processes or change one of them"
        )
    if p.context % p.ulysses:
        raise MegaSoraError(
            f"parallel.ulysses={p.ulysses} must divide parallel.context={p.context}; "
            f"use {choices(p.context, p.ulysses)}"
        )
    check_width(config)
    check_depth(config)
    data = processes // product
    packs = config.data.packs_per_step
    if packs % data:
        raise MegaSoraError(
            f"data.packs_per_step={packs} must be a multiple of the {data} data-parallel ranks "
            f"({processes} processes / {product}); use {packs // data * data or data} or {-(-packs // data) * data}"
        )
    if p.pipeline > 1:
        check_microbatches(packs // data, p.schedule, p.pipeline, p.stages_per_rank)
    if config.data.tokens_per_pack < p.context * p.tensor:
        raise MegaSoraError(
            f"data.tokens_per_pack={config.data.tokens_per_pack} is less than parallel.context={p.context} x "
            f"parallel.tensor={p.tensor} = {p.context * p.tensor} ranks that would share it; raise it or "
            "use fewer ranks"
        )
    if p.zero_stage > 1 and p.pipeline > 1:
        raise MegaSoraError(
            f"parallel.zero_stage={p.zero_stage} cannot be combined with parallel.pipeline={p.pipeline}: a pipeline "
            f"reduces gradients once, after all packs of a step; use parallel.zero_stage=1"
        )


def check_width(config: Config) -> None:
    p, m = config.parallel, config.model
    if m.heads % (p.tensor * p.ulysses):
        key = "tensor" if m.heads % p.tensor else "ulysses"
        heads = m.heads if key == "tensor" else m.heads // p.tensor
        ring = "" if key == "tensor" else ", or parallel.ulysses=1: a ring needs no heads"
        of = "model.heads" if heads == m.heads else f"model.heads={m.heads} / parallel.tensor={p.tensor} ="
        raise MegaSoraError(
            f"parallel.{key}={getattr(p, key)} must divide {of}{'=' if heads == m.heads else ' '}{heads}; use "
            f"{choices(heads, getattr(p, key))}{ring}"
        )
    hidden = int(m.width * m.mlp_ratio)
    if hidden % p.tensor:
        raise MegaSoraError(
            f"parallel.tensor={p.tensor} must divide the {hidden} hidden numbers of an MLP (model.width={m.width} x "
            f"model.mlp_ratio={m.mlp_ratio}); use {choices(hidden, p.tensor)} or another ratio"
        )


def check_depth(config: Config) -> None:
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
        raise MegaSoraError(
            f"model.depth={m.depth} blocks cannot be dealt evenly to {stages} stages (parallel.pipeline={p.pipeline}, "
            f"parallel.schedule={p.schedule}); use a depth of {m.depth // stages * stages or stages} or "
            f"{-(-m.depth // stages) * stages}, or {choices(m.depth, stages)} stages"
        )


def choices(number: int, wanted: int) -> str:
    """The divisors of a number, those nearest to what was asked for."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    near = sorted(sorted(divisors, key=lambda n: abs(n - wanted))[:4])
    return f"{', '.join(map(str, near[:-1]))} or {near[-1]}" if len(near) > 1 else str(near[0])
