"""What the host does between two packs of a training step: python -m benchmarks.host_waits [--out FILE.json]

Two variants of what a GPU needs from the CPU for a pack (rows, attention segments, frequencies, captions, noise):

    step      all of it is computed and copied in the step, each tensor by itself
    loader    the thread of the loader has computed it, and copied it in one piece: what a training does

`ms` is the time of the training thread for one pack until its noise and its model can be queued; `loader ms` that of
the loader's thread. Both are of one core, after three packs that are not counted. Waits and copies are those of noise,
model, loss and backward pass of one pack, counted on the device `meta` (megasora/testing/host_waits.py). A wait, and a
copy of memory that is not pinned, lasts until the GPU has done all that was queued before; that of the loader is
pinned. Without a GPU times are measured on `meta`, too, in seconds of CPU: copies then take no time.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.record import environment, write_record
from megasora.batch import VideoBatch
from megasora.config import ModelConfig, load
from megasora.data.pack import Record, make_batch
from megasora.device_transfer import DeviceTransfer, Packed, to_device
from megasora.diffusion.flow import FlowMatching
from megasora.model.dit import VideoDiT
from megasora.tasks.dit import NoisedShares, Share
from megasora.testing.host_waits import HostWaits
from megasora.text.embedders import FeatureEmbedder

PATCH_DIM, TEXT_DIM, WORDS = 64, 4096, 128  # Wan's patches and text features; words of a caption
DEPTH = 2  # blocks of the counted model: waits and copies do not depend on it
PACKS = {"one clip": ((16, 48, 48), 1), "144 images": ((1, 16, 16), 144)}  # grid and number of clips: 36,864 tokens


@dataclasses.dataclass(frozen=True)
class Result:
    pack: str
    variant: str  # step or loader
    ms: float
    loader_ms: float
    waits: int
    copies: int


def wan_1b(depth: int) -> ModelConfig:
    """Wan 2.1's 1.3B model, with operations that run anywhere."""
    return dataclasses.replace(
        load(None, []).model, width=1536, depth=depth, heads=12, mlp_ratio=8960 / 1536, modulation="shared",
        qk_norm="across_heads", conditioning="timestep", text_depth=0, kernel_backend="torch",
    )  # fmt: skip


def build_pack(grid: tuple[int, int, int], clips: int, padding: int = 256) -> VideoBatch:
    tokens = grid[0] * grid[1] * grid[2]
    patches, text = torch.randn(tokens, PATCH_DIM).bfloat16(), torch.randn(WORDS, TEXT_DIM).bfloat16()
    size = (8.0 * grid[1], 8.0 * grid[2], 4.0 * grid[0] - 3, 16.0)
    return make_batch([Record(i, patches, grid, text, size, "x") for i in range(clips)], clips * tokens + padding)


class Step:
    """What a step does with a pack, in both variants."""

    def __init__(self, device: torch.device, depth: int = DEPTH):
        m = wan_1b(depth)
        with torch.device("meta"):
            self.model = VideoDiT(m, PATCH_DIM, FeatureEmbedder(TEXT_DIM, m.width, m.text_depth, m.heads))
        self.model.to_empty(device=device).bfloat16()
        self.device, self.transfer = device, DeviceTransfer(device)
        self.objective = FlowMatching(load(None, []).objective, 0)

    def plan(self, pack: VideoBatch) -> Share:
        clean, noise = self.objective.draw(pack, 0)
        return Share(dataclasses.replace(clean, plan=self.model.plan(clean)), noise)

    def load(self, pack: VideoBatch) -> Packed[Share]:
        """In the loader's thread."""
        return self.transfer.pack(self.plan(pack))

    def share(self, pack: VideoBatch, loaded: Packed[Share], variant: str) -> Share:
        """In the training thread."""
        return self.transfer(loaded).wait() if variant == "loader" else to_device(self.plan(pack), self.device)

    def run(self, pack: VideoBatch, loaded: Packed[Share], variant: str) -> None:
        """Noise, model, loss, backward pass."""
        packed = loaded if variant == "loader" else Packed(self.share(pack, loaded, variant))
        num_tokens = torch.full((), packed.value.noise.num_noised, device=self.device)
        noised = NoisedShares([packed], self.transfer, num_tokens)
        noised.loss(self.model(noised[0]), 0).backward()


def median_ms(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Of the host; a GPU has nothing to do at the start."""
    on_gpu, seconds = device.type == "cuda", []
    clock = time.perf_counter if on_gpu else time.thread_time
    for _ in range(repeats + 3):
        if on_gpu:
            torch.cuda.synchronize()
        start = clock()
        function()
        seconds.append(clock() - start)
    return statistics.median(seconds[3:]) * 1000


def measure(pack_name: str, variant: str, device: torch.device, repeats: int) -> Result:
    pack, step, counted = build_pack(*PACKS[pack_name]), Step(device, depth=1), Step(torch.device("meta"))
    loaded = step.load(pack)

    ms = median_ms(lambda: step.share(pack, loaded, variant), device, repeats)
    loader_ms = median_ms(lambda: step.load(pack), device, repeats) if variant == "loader" else 0.0
    loaded_on_meta = counted.load(pack)
    with HostWaits() as found:
        counted.run(pack, loaded_on_meta, variant)
    return Result(pack_name, variant, ms, loader_ms, len(found.waits), len(found.copies))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.host_waits", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=20, help="timed packs of each variant")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "meta")
    results = [measure(pack, variant, device, options.repeats) for pack in PACKS for variant in ("step", "loader")]
    table = Table("pack", "computed in", "ms", "loader ms", "waits", "copies")
    for r in results:
        table.add_row(r.pack, r.variant, f"{r.ms:.2f}", f"{r.loader_ms:.2f}", str(r.waits), str(r.copies))
    Console(width=100).print(table)
    if options.out:
        body = {"device": str(device), "results": [dataclasses.asdict(r) for r in results]}
        write_record(options.out, environment(), body)


if __name__ == "__main__":
    main()
