"""`megasora checkpoint export`: the weights of a checkpoint, or all of it, in the formats of other programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasora.build import build_model, patch_dim
from megasora.checkpoint.safetensors_file import check_new_file, write_tensors
from megasora.commands.checkpoint_source import num_bytes, open_source, with_newest
from megasora.config import Config
from megasora.errors import MegaSoraError
from megasora.formats.safetensors_folder import DTYPES, SHARD_BYTES, check_new_folder, rounded
from megasora.formats.source import ExportSource
from megasora.observe.byte_progress import byte_progress

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Format:
    """One of --format. `options`: the options that it reads, with their defaults."""

    write: Callable[
        ..., str | None
    ]  # (source, out, advance, **options) -> a sentence to print instead of the usual one
    options: dict[str, Any]
    is_file: bool = False
    num_bytes: Callable[..., int] = lambda source, **options: num_bytes(source.sharded.shapes)


def export_checkpoint(place: Path, name: str, weights: str | None, out: Path, given: dict[str, Any]) -> None:
    """Writes `out` in the format `name`. `given`: the options of the command line, None for those that were left out.

    `weights`: of --weights; None: ema, but the raw weights where a training is to go on with their moments. Raises
    MegaSoraError for options of another format.
    """
    chosen = FORMATS[name]
    options = check_options(name, chosen, given)
    if not 1 <= options.get("shard_bytes", 1):
        raise MegaSoraError(f"--shard-bytes {options['shard_bytes']} must be at least 1; of a file, e.g. 5_000_000_000")
    (check_new_file if chosen.is_file else check_new_folder)(out)
    if name == "deepspeed" and weights not in (None, "raw"):
        raise MegaSoraError(
            f"--weights {weights}: --format deepspeed has the moments of the raw weights; leave --weights out"
        )
    weights = weights or ("raw" if name == "deepspeed" else "ema")

    def export(folder: Path) -> str:
        source = open_source(folder, weights)
        with byte_progress("export", chosen.num_bytes(source, **options)) as advance:
            sentence = chosen.write(source, out, advance, **options)
        return sentence or f"{described(source, weights)} of {source.folder} in {out}"

    print(with_newest(place, export))


def check_options(name: str, chosen: Format, given: dict[str, Any]) -> dict[str, Any]:
    for option, value in given.items():
        if value is not None and option not in chosen.options:
            others = ", ".join(other for other, f in FORMATS.items() if option in f.options)
            raise MegaSoraError(f"--{option.replace('_', '-')} is of --format {others}, not of {name}; leave it out")
    return {option: default if given[option] is None else given[option] for option, default in chosen.options.items()}


def described(source: ExportSource, weights: str) -> str:
    if source.kind == "weights" and weights != "raw":
        return "imported weights"
    return f"{'raw' if source.kind == 'weights' else source.kind} weights"


def to_safetensors(source: ExportSource, out: Path, advance: Advance, dtype: str) -> None:
    """All weights in one file, for other programs and run.start=init:."""

    def value_of(name: str) -> Tensor:
        return rounded(name, source.sharded.full_tensor(source.kind, name), DTYPES[dtype])

    write_tensors(out, source.sharded.shapes, value_of, {}, advance, DTYPES[dtype])


def to_megasora(source: ExportSource, out: Path, advance: Advance, dtype: str, shard_bytes: int) -> None:
    from megasora.formats.folder_export import export_megasora

    export_megasora(source, out, DTYPES[dtype], shard_bytes, advance)


def to_diffusers(source: ExportSource, out: Path, advance: Advance, dtype: str, shard_bytes: int, pipeline: str) -> str:
    from megasora.formats.diffusers_folder import export_diffusers

    return export_diffusers(source, out, advance, DTYPES[dtype], shard_bytes, pipeline)


def to_dcp(
    source: ExportSource, out: Path, advance: Advance, dtype: str, everything: bool, prefix: str | None
) -> str | None:
    from megasora.formats.dcp_export import MODEL, export_dcp

    export_dcp(source, out, DTYPES[dtype], everything, f"{MODEL}." if prefix is None else prefix, advance)
    return f"the training state of {source.folder} in {out}" if everything else None


def dcp_bytes(source: ExportSource, dtype: str, everything: bool, prefix: str | None) -> int:
    from megasora.formats.dcp_export import num_bytes

    return num_bytes(source, DTYPES[dtype], everything)


def to_deepspeed(source: ExportSource, out: Path, advance: Advance, dtype: str, zero_stage: int, processes: int) -> str:
    from megasora.formats.deepspeed_export import export_deepspeed
    from megasora.parallelize import uses_weight_decay

    if dtype == "fp16":
        raise MegaSoraError("--dtype fp16: --format deepspeed has bf16 and fp32")
    if not 1 <= zero_stage <= 3:
        raise MegaSoraError(f"--zero-stage {zero_stage} must be 1, 2 or 3")
    if not 1 <= processes <= MAX_PROCESSES:
        raise MegaSoraError(f"--processes {processes} must be from 1 to {MAX_PROCESSES}")
    shapes = model_shapes(source.config)
    export_deepspeed(source, out, shapes, uses_weight_decay, zero_stage, processes, DTYPES[dtype], advance)
    ranks = "1 process" if processes == 1 else f"{processes} processes"
    return f"weights and moments of {source.folder} for DeepSpeed, ZeRO {zero_stage}, {ranks}, in {out}"


def model_shapes(config: Config) -> dict[str, torch.Size]:
    """Shapes of the parameters of a run's model, in the order of named_parameters()."""
    with torch.device("meta"):
        model = build_model(config, patch_dim(config))
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def every_kind(source: ExportSource, **options: Any) -> int:
    return num_bytes(source.sharded.shapes, len(source.sharded.kinds))


def in_dtype(source: ExportSource, dtype: str, **options: Any) -> int:
    return num_bytes(source.sharded.shapes) * DTYPES[dtype].itemsize // torch.float32.itemsize


MAX_PROCESSES = 65536
FORMATS = {
    "safetensors": Format(to_safetensors, {"dtype": "fp32"}, is_file=True, num_bytes=in_dtype),
    "megasora": Format(to_megasora, {"dtype": "fp32", "shard_bytes": SHARD_BYTES}, num_bytes=in_dtype),
    "diffusers": Format(
        to_diffusers, {"dtype": "fp32", "shard_bytes": SHARD_BYTES, "pipeline": "link"}, num_bytes=in_dtype
    ),
    "dcp": Format(to_dcp, {"dtype": "fp32", "everything": False, "prefix": None}, num_bytes=dcp_bytes),
    "deepspeed": Format(
        to_deepspeed, {"dtype": "fp32", "zero_stage": 2, "processes": 1},
        num_bytes=every_kind,
    ),
}  # fmt: skip
