"""The data path, from files to packs: python -m benchmarks.data [--out benchmarks/results/data.json]

    loader      clips and bytes per second of PackLoader, compared with a sequential read of the same tars, with plain
                webdataset, which returns an array of the same patches, and with MosaicML Streaming, if installed. Tars
                are in the page cache, or, `cold`, evicted from it before each trial
    plan        CPU seconds to plan an epoch of a million clips and to resume within it; padding; the cost of the most
                expensive of 64 ranks, over the mean
    training    useful tokens of packs and of buckets: `benchmarks/buckets.py`
    ingest      frames per second of one core, from video files to shards, compared with PyAV decoding the same files

The loader verifies a CRC-32 of every byte, reads captions, and reads clips into packs in random order; the others
verify nothing and return clips in the order of the tar. `raw` discards what it reads: it reuses one small buffer, which
stays in the CPU cache. `raw, kept` reads into the memory of eight packs, round-robin; `raw + CRC-32` verifies. The
variants are measured alternately; ratios are of the same trial. Ingest is compared by CPU seconds, with those of its
processes, since other programs slow these less.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from zlib_ng.zlib_ng import crc32

from benchmarks.buckets import count_arithmetic, measure_seconds
from benchmarks.record import environment, write_record
from megasora.build import patch_dim
from megasora.config import Config, load
from megasora.data.loader import PackLoader
from megasora.data.manifest_writer import write_manifest
from megasora.data.mixture import open_mixture
from megasora.data.pack import Record
from megasora.data.packing_plan import Cursor, PackingPlan, assign_packs_to_ranks
from megasora.data.shard_writer import BlockWriter
from megasora.ingest import ingest
from megasora.model.flops import attention_break_even_tokens
from megasora.testing.mixes import heavy_grids, heavy_mix
from megasora.text import build_text_encoder

PRESET = Path(__file__).resolve().parents[1] / "configs" / "dit_7b.yaml"  # whose arithmetic is counted
SMALL_MODEL = [  # whose steps are timed
    "model.width=64", "model.depth=2", "model.heads=2", "codec.channels=16", "run.dtype=float32",
]  # fmt: skip
CAPTION = "a red circle moves slowly over a striped background while the camera pans to the left"
CHUNK_BYTES = 1 << 20  # of one raw read
RAW, KEPT, CHECKED = "raw", "raw, kept", "raw + CRC-32"
WEBDATASET, STREAMING = "webdataset", "MosaicML Streaming"
COLD_RAW, COLD = "raw, cold", "loader, 4 threads, cold"
RESUME_REPEATS = 2
BITS_PER_PIXEL = 0.14  # of the videos that are ingested

# ---- the loader


@dataclass(frozen=True)
class Amount:
    """What a variant read in one trial."""

    clips: int
    bytes: int  # of the tars
    seconds: float
    cpu_seconds: float = 0.0  # of all threads


@dataclass(frozen=True)
class Loading:
    """One variant of loading; lists have one number per trial."""

    variant: str
    clips_per_second: list[float]
    clips_per_cpu_second: list[float]
    gb_per_second: list[float]  # 10^9 bytes
    of_raw: list[float]  # bytes per second, over those of the raw read; a cold variant is compared with the cold one
    of_raw_cpu: list[float]  # the same per CPU second
    of_webdataset: list[float]  # clips per second, over those of webdataset
    of_webdataset_cpu: list[float]  # the same per CPU second


def write_shards(folder: Path, grids_I3: np.ndarray, width: int, shard_mib: int) -> None:
    """Clips of noise with `width` features per token, and captions as long as CAPTION, of 10^5 different words."""
    noise, words, length = torch.Generator().manual_seed(0), np.random.default_rng(0), len(CAPTION.split())
    with BlockWriter(folder, 0, shard_mib << 20) as writer:
        for i, (t, h, w) in enumerate(grids_I3.tolist()):
            patches_LP, native = torch.randn(t * h * w, width, generator=noise), (16.0 * h, 16.0 * w, 4.0 * t, 8.0)
            caption = " ".join(f"word{rank % 100_000}" for rank in words.zipf(1.2, length))  # Zipf's law
            record = Record(i, patches_LP, (t, h, w), torch.zeros(0), native, caption)
            writer.add("train", record, {"source": f"{i}.mp4", "sha256": "0" * 64})
        writer.commit({}, {})
    write_manifest(folder, "noise", "bytes-16", [1, 1, 1], 1, {})


def read_raw(tars: list[Path], clips: int, checked: bool, memory: list[bytearray] | None = None) -> Amount:
    """Reads tars sequentially, into the buffers `memory`, round-robin."""
    views = itertools.cycle([memoryview(buffer) for buffer in memory or [bytearray(CHUNK_BYTES)]])
    num_bytes, start = 0, time.perf_counter()
    for path in tars:
        checksum = 0
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(view := next(views)):
                num_bytes += count
                checksum = crc32(view[:count], checksum) if checked else 0
    return Amount(clips, num_bytes, time.perf_counter() - start)


def run_loader(config: Config, threads: int) -> Amount:
    """Reads the whole steps of an epoch."""
    mixture = open_mixture(config.data, "train")
    encoder = build_text_encoder(config.text)
    break_even = attention_break_even_tokens(config.model, patch_dim(config))
    loader = PackLoader(
        mixture,
        replace(config.data, reader_threads=threads),
        0,
        lambda caption: encoder.encode([caption])[0],
        break_even,
    )
    tokens = int(mixture.tokens_I.sum())
    size_of = mixture.datasets[0].index.rows["record"]["size"]
    num_clips, num_bytes, start = 0, 0, time.perf_counter()
    steps = iter(loader)
    for step in itertools.islice(steps, tokens // (config.data.tokens_per_pack * config.data.packs_per_step)):
        for pack in step.packs:
            num_clips += pack.num_segments
            num_bytes += int(size_of[pack.sample_ids_G.numpy()].sum())
    seconds = time.perf_counter() - start
    steps.close()
    return Amount(num_clips, num_bytes, seconds)


def run_webdataset(tars: list[Path]) -> Amount:
    import webdataset

    num_clips, start = 0, time.perf_counter()
    for clip in webdataset.WebDataset([str(path) for path in tars], shardshuffle=False):
        decode(clip["patches.f16"], clip["meta.json"], clip["caption.txt"])
        num_clips += 1
    return Amount(num_clips, sum(path.stat().st_size for path in tars), time.perf_counter() - start)


def decode(patches: bytes, meta: bytes, caption: bytes) -> tuple[np.ndarray, str]:
    return np.frombuffer(patches, "<f2").reshape(json.loads(meta)["shape"]), caption.decode("utf-8")


def write_streaming(folder: Path, tars: list[Path]) -> None:
    import webdataset
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"patches": "bytes", "meta": "bytes", "caption": "bytes"}) as writer:
        for clip in webdataset.WebDataset([str(path) for path in tars], shardshuffle=False):
            writer.write({"patches": clip["patches.f16"], "meta": clip["meta.json"], "caption": clip["caption.txt"]})


def run_streaming(folder: Path, tars: list[Path]) -> Amount:
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder), shuffle=False, batch_size=1)
    num_clips, start = 0, time.perf_counter()
    for clip in dataset:
        decode(clip["patches"], clip["meta"], clip["caption"])
        num_clips += 1
    return Amount(num_clips, sum(path.stat().st_size for path in tars), time.perf_counter() - start)


def evict_from_page_cache(tars: list[Path]) -> None:
    for path in tars:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def measure_loader(
    folder: Path, clips: int, tokens_per_pack: int, threads: list[int], trials: int
) -> tuple[list[Loading], dict]:
    """Writes tars to `folder`, and reads them with every variant. Returns the results, and the contents of the tars."""
    config = load(
        None,
        [f"data.shards={folder / 'shards'}", f"data.tokens_per_pack={tokens_per_pack}", "data.packs_per_step=2"],
    )
    grids = heavy_grids(tokens_per_pack, clips, 0)
    write_shards(folder / "shards", grids, patch_dim(config), 64)
    tars = sorted((folder / "shards").glob("*.tar"))
    packs = [bytearray(2 * patch_dim(config) * tokens_per_pack) for _ in range(8)]

    def cold(run: Callable[[], Amount]) -> Amount:
        evict_from_page_cache(tars)
        return run()

    variants: dict[str, Callable[[], Amount]] = {
        RAW: lambda: read_raw(tars, clips, False),
        KEPT: lambda: read_raw(tars, clips, False, packs),
        CHECKED: lambda: read_raw(tars, clips, True),
        WEBDATASET: lambda: run_webdataset(tars),
        **{f"loader, {n} threads": lambda n=n: run_loader(config, n) for n in threads},
    }
    if importlib.util.find_spec("streaming"):
        write_streaming(folder / "streaming", tars)
        variants[STREAMING] = lambda: run_streaming(folder / "streaming", tars)
    variants |= {
        COLD_RAW: lambda: cold(lambda: read_raw(tars, clips, False)),
        COLD: lambda: cold(lambda: run_loader(config, 4)),
    }
    measured: dict[str, list[Amount]] = {variant: [] for variant in variants}
    for trial in range(trials + 1):
        for variant, run in variants.items():
            before = cpu_seconds()
            amount = run()
            if trial > 0:
                measured[variant].append(replace(amount, cpu_seconds=cpu_seconds() - before))
    per_second = {variant: [a.clips / a.seconds for a in amounts] for variant, amounts in measured.items()}
    per_cpu = {variant: [a.clips / a.cpu_seconds for a in amounts] for variant, amounts in measured.items()}
    gb = {variant: [a.bytes / a.seconds / 1e9 for a in amounts] for variant, amounts in measured.items()}
    gb_cpu = {variant: [a.bytes / a.cpu_seconds / 1e9 for a in amounts] for variant, amounts in measured.items()}
    raw = {variant: COLD_RAW if "cold" in variant else RAW for variant in variants}
    results = [
        Loading(
            variant, per_second[variant], per_cpu[variant], gb[variant],
            ratios(gb[variant], gb[raw[variant]]), ratios(gb_cpu[variant], gb_cpu[raw[variant]]),
            ratios(per_second[variant], per_second[WEBDATASET]), ratios(per_cpu[variant], per_cpu[WEBDATASET]),
        )
        for variant in variants
    ]  # fmt: skip
    size = sum(path.stat().st_size for path in tars)
    return results, {"clips": clips, "tokens": int(grids.prod(1).sum()), "tars": len(tars), "bytes": size}


def ratios(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


# ---- the plan


@dataclass(frozen=True)
class Planning:
    """Plans with one size of pack."""

    tokens_per_pack: int
    clips: int
    windows: int
    packs: int
    plan_cpu_seconds: float  # of all windows of an epoch, on one thread
    resume_cpu_seconds: float  # from a new plan to the first step, in the slowest window of the second epoch
    padding: float  # fraction of the tokens of an epoch's packs
    max_over_mean: dict[str, float]  # packs per rank and step -> cost of the ranks of a step, mean over the steps
    q999_over_mean: dict[str, float]  # the same, 99.9 % quantile over the steps
    worst_over_mean: dict[str, float]  # the same, the worst step


def measure_plan(tokens_per_pack: int, clips: int, ranks: int, packs_per_rank: list[int], break_even: int) -> Planning:
    """`break_even`: tokens, the `attention_break_even_tokens` of PackingPlan."""
    tokens, window = heavy_mix(tokens_per_pack, clips, 0), load(None, []).data.packing_window

    def plan(packs_per_step: int) -> PackingPlan:
        return PackingPlan([tokens], [1.0], tokens_per_pack, packs_per_step, window, break_even, 0)

    start = time.process_time()
    first = plan(ranks)
    packs = sum(len(first.window_at(0, w, 0).packs) for w in range(first.num_windows))
    plan_cpu_seconds = time.process_time() - start

    resume_cpu = []
    for w in range(first.num_windows):
        middle = len(first.window_at(1, w, 0).packs) // 2
        times = []
        for _ in range(RESUME_REPEATS):
            start = time.process_time()
            next(plan(ranks).steps(Cursor(1, w, middle)))
            times.append(time.process_time() - start)
        resume_cpu.append(min(times))

    ratios_of = {n: [rank_imbalance(costs, ranks) for costs in step_costs(plan(ranks * n))] for n in packs_per_rank}
    return Planning(
        tokens_per_pack, clips, first.num_windows, packs, plan_cpu_seconds, max(resume_cpu),
        1 - int(tokens.sum()) / (packs * tokens_per_pack),
        {str(n): float(np.mean(r)) if r else 1.0 for n, r in ratios_of.items()},
        {str(n): float(np.quantile(r, 0.999)) if r else 1.0 for n, r in ratios_of.items()},
        {str(n): max(r, default=1.0) for n, r in ratios_of.items()},
    )  # fmt: skip


def step_costs(plan: PackingPlan) -> Iterator[np.ndarray]:
    """The costs of the packs of each step of the first epoch."""
    for step in itertools.takewhile(lambda step: step.next_cursor.epoch == 0, plan.steps(Cursor())):
        yield step.costs


def rank_imbalance(costs: np.ndarray, ranks: int) -> float:
    """max / mean of the costs per rank, of a step's packs."""
    sums = costs[assign_packs_to_ranks(costs, ranks)].sum(1)
    return float(sums.max() / sums.mean())


# ---- ingest


@dataclass(frozen=True)
class Ingesting:
    """One variant of reading videos; lists have one number per trial."""

    variant: str
    frames_per_second: list[float]  # per CPU second
    wall_frames_per_second: list[float]
    ingest_over_this: list[float]  # frames per CPU second of ingest, over those of this variant


def write_videos(folder: Path, num_videos: int, frames: int, height: int, width: int) -> None:
    """H.264 at the bit rate of web video (3 Mbit/s at 720p): a camera pans over a grainy texture."""
    import av

    folder.mkdir()
    for clip in range(num_videos):
        rng = np.random.default_rng(clip)
        world = np.zeros((height + frames, width + frames, 3), np.float32)
        for cell in (128, 32, 8):
            coarse = rng.normal(0, cell**0.5, (world.shape[0] // cell + 2, world.shape[1] // cell + 2, 3))
            world += (
                np.kron(coarse, np.ones((cell, cell, 1)))[: world.shape[0], : world.shape[1]].astype(np.float32) * 3
            )
        with av.open(str(folder / f"{clip}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=24, options={"preset": "veryfast"})
            stream.bit_rate = int(BITS_PER_PIXEL * 24 * height * width)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            grain = rng.normal(0, 8, (height + 64, width + 64, 1)).astype(np.float32)
            for f in range(frames):
                y, x = rng.integers(64, size=2)
                view = world[f : f + height, f : f + width] + grain[y : y + height, x : x + width]
                picture = av.VideoFrame.from_ndarray(np.clip(128 + view, 0, 255).astype(np.uint8), "rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
        (folder / f"{clip}.txt").write_text(CAPTION)


def decode_videos(folder: Path, to_rgb: bool) -> int:
    """Decodes all videos on one thread. Returns the number of frames."""
    import av

    count = 0
    for path in sorted(folder.glob("*.mp4")):
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            for frame in container.decode(video=0):
                if to_rgb:
                    frame.to_ndarray(format="rgb24")
                count += 1
    return count


def ingest_videos(folder: Path, out: Path) -> int:
    """Returns the number of frames of the train split."""
    with contextlib.redirect_stdout(io.StringIO()):
        manifest = ingest(folder, out, load(None, ["ingest.workers=1"]))
    return manifest.splits["train"]["frames"]


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure_ingest(
    folder: Path, num_videos: int, frames: int, height: int, width: int, trials: int
) -> tuple[list[Ingesting], dict]:
    videos = folder / "videos"
    write_videos(videos, num_videos, frames, height, width)
    variants: dict[str, Callable[[int], int]] = {
        "PyAV, decoded": lambda trial: decode_videos(videos, to_rgb=False),
        "PyAV, decoded to RGB": lambda trial: decode_videos(videos, to_rgb=True),
        "ingest": lambda trial: ingest_videos(videos, folder / f"ingested-{trial}"),
    }
    cpu: dict[str, list[float]] = {variant: [] for variant in variants}
    wall: dict[str, list[float]] = {variant: [] for variant in variants}
    for trial in range(trials + 1):
        for variant, run in variants.items():
            start, before = time.perf_counter(), cpu_seconds()
            count = run(trial)
            if count != num_videos * frames:
                raise RuntimeError(f"{variant} read {count} of {num_videos * frames} frames")
            if trial > 0:
                cpu[variant].append(count / (cpu_seconds() - before))
                wall[variant].append(count / (time.perf_counter() - start))
    size = sum(path.stat().st_size for path in videos.glob("*.mp4"))
    about = {"videos": num_videos, "frames": frames, "height": height, "width": width, "bytes": size}
    return [
        Ingesting(variant, cpu[variant], wall[variant], ratios(cpu["ingest"], cpu[variant])) for variant in variants
    ], about


# ---- tables


def median_and_range(values: list[float], form: str = ".2f") -> str:
    return f"{np.median(values):{form}} ({min(values):{form}} - {max(values):{form}})"


def build_table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def loader_table(results: list[Loading], about: dict) -> Table:
    title = f"{about['clips']:,} clips, {about['bytes'] / 1e6:,.0f} MB in {about['tars']} tars; median (min - max)"
    columns = ["", "clips/s", "GB/s", "of raw", "times webdataset", "clips/CPU s", "of raw", "times webdataset"]
    rows = [
        [
            r.variant,
            median_and_range(r.clips_per_second, ",.0f"),
            median_and_range(r.gb_per_second),
            median_and_range(r.of_raw),
            median_and_range(r.of_webdataset),
        ]
        + [
            f"{np.median(r.clips_per_cpu_second):,.0f}",
            median_and_range(r.of_raw_cpu),
            median_and_range(r.of_webdataset_cpu),
        ]
        for r in results
    ]
    return build_table(title, columns, rows)


def plan_table(results: list[Planning], ranks: int) -> Table:
    packs_per_rank = results[0].max_over_mean
    columns = [
        "tokens per pack", "packs", "plan an epoch, CPU s", "resume, CPU s", "padding",
        *(f"max / mean of {ranks} ranks,\n{n} packs per rank (99.9 %, worst step)" for n in packs_per_rank),
    ]  # fmt: skip
    rows = [
        [
            f"{r.tokens_per_pack:,}",
            f"{r.packs:,}",
            f"{r.plan_cpu_seconds:.2f}",
            f"{r.resume_cpu_seconds:.2f}",
            f"{r.padding:.4%}",
        ]
        + [f"{r.max_over_mean[n]:.4f} ({r.q999_over_mean[n]:.3f}, {r.worst_over_mean[n]:.3f})" for n in packs_per_rank]
        for r in results
    ]
    return build_table(f"{results[0].clips:,} clips, {results[0].windows} windows", columns, rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file for all results")
    parser.add_argument(
        "--trials", type=int, default=3, help="how often each variant of loading and of ingest is measured"
    )
    parser.add_argument("--folder", type=Path, help="where temporary shards and videos are written")
    parser.add_argument(
        "--load-clips", type=int, default=4800, help="clips to load, about 0.25 MB each, in packs of 16,384 tokens"
    )
    parser.add_argument("--plan-clips", type=int, default=1_000_000, help="clips to plan an epoch of")
    parser.add_argument(
        "--tokens-per-pack", type=int, nargs="+", default=[8192, 65_536, 1 << 20], help="sizes of packs to plan"
    )
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--bucket-clips", type=int, default=50_000, help="clips whose arithmetic is counted")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each variant of training, in two trials")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per pack in these steps")
    parser.add_argument("--videos", type=int, nargs=4, default=[4, 120, 720, 1280], metavar=("N", "FRAMES", "H", "W"))
    options = parser.parse_args(arguments)

    head, console = environment(), Console(width=156)
    torch.set_num_threads(1)
    preset = load(str(PRESET), [])
    break_even = attention_break_even_tokens(preset.model, patch_dim(preset))
    body: dict[str, object] = {"load_average": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        loading, about = measure_loader(folder, options.load_clips, 16_384, [0, 1, 4], options.trials)
        console.print(loader_table(loading, about))
        missing = [] if any(r.variant == STREAMING for r in loading) else [STREAMING]
        for variant in missing:
            console.print(f"{variant} is not installed")
        body["loader"] = {**about, "not_installed": missing, "results": [asdict(r) for r in loading]}

        plans = [
            measure_plan(n, options.plan_clips, options.ranks, [1, 4], break_even) for n in options.tokens_per_pack
        ]
        console.print(plan_table(plans, options.ranks))
        body["plan"] = {"ranks": options.ranks, "results": [asdict(r) for r in plans]}

        counted = [r for n in (1, options.ranks) for r in count_arithmetic(preset, break_even, options.bucket_clips, n)]
        title = f"{options.bucket_clips:,} clips in packs of {preset.data.tokens_per_pack:,}, arithmetic of dit_7b"
        columns = ["", "ranks", "useful tokens per GFLOP", "packs / this", "useful / computed", "seen", "max / mean"]
        rows = [
            [r.variant, str(r.ranks), f"{r.tokens_per_gflop:.4f}", f"{r.packs_over_this:.2f}"]
            + [f"{r.useful_fraction:.1%}", f"{r.seen_fraction:.1%}", f"{r.max_over_mean:.3f}"]
            for r in counted
        ]
        console.print(build_table(title, columns, rows))
        small = load(None, small_settings(options.tokens))
        small_break_even = attention_break_even_tokens(small.model, patch_dim(small))
        timed = measure_seconds(small, small_break_even, options.bucket_clips // 5, options.steps, 2)
        rows = [
            [r.variant, median_and_range(r.tokens_per_second, ",.0f"), median_and_range(r.packs_over_this)]
            for r in timed
        ]
        title = f"packs of {options.tokens:,}, width 64, 2 blocks, CPU seconds"
        console.print(build_table(title, ["", "useful tokens per second", "packs / this"], rows))
        body["training"] = {
            "preset": PRESET.stem, "tokens_per_pack": preset.data.tokens_per_pack, "clips": options.bucket_clips,
            "arithmetic": [asdict(r) for r in counted], "settings": small_settings(options.tokens),
            "seconds": [asdict(r) for r in timed],
        }  # fmt: skip

        ingested, about = measure_ingest(folder, *options.videos, options.trials)
        title = f"{about['videos']} videos of {about['frames']} frames of {about['height']}x{about['width']}, one core"
        rows = [
            [
                r.variant,
                median_and_range(r.frames_per_second, ".0f"),
                median_and_range(r.wall_frames_per_second, ".0f"),
                median_and_range(r.ingest_over_this),
            ]
            for r in ingested
        ]
        columns = ["", "frames per CPU second", "frames per second", "ingest / this, CPU"]
        console.print(build_table(title, columns, rows))
        body["ingest"] = {**about, "results": [asdict(r) for r in ingested]}
    if options.out:
        write_record(options.out, head, body)
        console.print(f"wrote {options.out}")


def small_settings(tokens: int) -> list[str]:
    return [*SMALL_MODEL, f"data.tokens_per_pack={tokens}"]


if __name__ == "__main__":
    main()
