"""Memory that a block retains for its backward pass: python -m benchmarks.memory [--out benchmarks/results/memory.json]

A block of width d and MLP width ff in bf16, 2 bytes per element, by model.recompute. For each token it retains

    none            17 vectors of d: the block's input; normed and modulated; q, k, v; q and k normed and rotated;
                    attention's output; the input of the first gate; the sum; normed; q of the cross-attention; normed;
                    its output; the sum; normed and modulated; the input of the last gate
                    1 vector of ff: before the GELU                                 bytes: (34 + 2 ff / d) d
    full            the block's input                                               2 d
    keep_attention  the block's input and self-attention's output                   4 d

and, not in the formula, a few elements for each norm and softmax: about 1 % with heads of 64. Captions and rows, which
do not grow with the tokens, are short here. What all blocks use (coords, conditioning) is retained once.

Counted are the bytes of every storage that is allocated in a forward pass and still alive after it, in a model of one
block and of two; the difference is one block's. One segment, training mode, CPU. Counts repeat exactly.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.record import environment, write_record
from megasora.batch import VideoBatch
from megasora.build import build_model, patch_dim
from megasora.config import Config, load
from megasora.data.pack import Record, make_batch

DIALECTS = {
    "DiT": ["model.modulation=block", "model.qk_norm=per_head", "model.mlp_ratio=4"],
    "Wan": ["model.modulation=shared", "model.qk_norm=across_heads", "model.mlp_ratio=2.7"],
}
MODES = ("none", "full", "keep_attention")
HEAD_DIM, WORDS = 64, 8


class LiveStorages(TorchDispatchMode):
    """Records the storages of all tensors computed while it is entered, except those of `known` tensors."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.known = {StorageWeakRef(x.untyped_storage()) for x in known}
        self.bytes_of: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (ref := StorageWeakRef(x.untyped_storage())) not in self.known:
                self.bytes_of[ref] = x.untyped_storage().nbytes()
        return result

    def alive(self) -> int:
        """Bytes of the recorded storages that are still referenced."""
        gc.collect()
        return sum(nbytes for ref, nbytes in self.bytes_of.items() if not ref.expired())


def one_segment(config: Config) -> VideoBatch:
    """A pack filled by one clip with a caption of WORDS words."""
    tokens = config.data.tokens_per_pack
    draw = torch.Generator().manual_seed(0)
    patches_LP = torch.randn(tokens, patch_dim(config), generator=draw)
    words = torch.randint(0, 257, (WORDS, 16), generator=draw)
    return make_batch([Record(0, patches_LP, (tokens, 1, 1), words, (64.0, 64.0, 9.0, 8.0), "a caption")], tokens)


def retained_bytes(config: Config) -> int:
    """Bytes alive after a forward pass of the whole bf16 model, with its output, without weights and pack."""
    model = build_model(config, patch_dim(config))
    model.initialise(0)
    model.bfloat16().train()
    batch = one_segment(config)
    known = [*model.parameters(), *(x for x in vars(batch).values() if isinstance(x, Tensor))]
    with LiveStorages(known) as storages:
        prediction_LP = model(batch)
        retained = storages.alive()
    assert prediction_LP.requires_grad
    return retained


def formula(mode: str, width: int, hidden: int) -> float:
    """Bytes per token and block."""
    return {"none": 34 * width + 2 * hidden, "full": 2 * width, "keep_attention": 4 * width}[mode]


@dataclass(frozen=True)
class Result:
    dialect: str
    width: int
    mlp_hidden: int
    recompute: str
    tokens: int
    retained_bytes: int  # of one block
    retained_bytes_per_token: float
    formula_bytes_per_token: float
    ratio: float


def measure(dialect: str, width: int, mode: str, tokens: int) -> Result:
    """One block: the difference between a model of two blocks and a model of one."""
    settings = [
        *DIALECTS[dialect], f"model.width={width}", f"model.heads={width // HEAD_DIM}", f"model.recompute={mode}",
        f"data.tokens_per_pack={tokens}", "model.text_depth=0", "codec.channels=16",
    ]  # fmt: skip
    shallow, deep = (load(None, [*settings, f"model.depth={depth}"]) for depth in (1, 2))
    retained = retained_bytes(deep) - retained_bytes(shallow)
    expected = formula(mode, width, deep.model.mlp_hidden)
    return Result(
        dialect,
        width,
        deep.model.mlp_hidden,
        mode,
        tokens,
        retained,
        retained / tokens,
        expected,
        retained / tokens / expected,
    )


def table_of(results: list[Result]) -> Table:
    table = Table(title=f"bytes that a block retains for its backward pass, for each of {results[0].tokens} tokens")
    for name in ("dialect", "d", "ff", "model.recompute", "formula", "measured", "ratio"):
        table.add_column(name, justify="left" if name in ("dialect", "model.recompute") else "right")
    for r in results:
        sizes = f"{r.width:,}", f"{r.mlp_hidden:,}", r.recompute
        table.add_row(
            r.dialect,
            *sizes,
            f"{r.formula_bytes_per_token:,.0f}",
            f"{r.retained_bytes_per_token:,.1f}",
            f"{r.ratio:.4f}",
        )
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file for all results")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024], help=f"multiples of {HEAD_DIM}")
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args(arguments)
    for width in options.widths:
        if width < HEAD_DIM or width % HEAD_DIM:
            parser.error(f"--widths {width} must be a multiple of {HEAD_DIM}, the head dim")

    head, console = environment(), Console(width=120)
    results = [
        measure(dialect, width, mode, options.tokens)
        for dialect in DIALECTS
        for width in options.widths
        for mode in MODES
    ]
    console.print(table_of(results))
    if options.out:
        body = {"dtype": "bfloat16", "head_dim": HEAD_DIM, "words": WORDS, "results": [asdict(r) for r in results]}
        write_record(options.out, head, body)
        console.print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
