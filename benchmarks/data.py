"""The way of the data, from files to packs: python -m benchmarks.data [--out benchmarks/results/data.json]

    loader      clips and bytes a second of PackLoader, against reading the same tars from one end to the other, against
                plain webdataset, which makes an array of the same patches, and against MosaicML Streaming where it is
                installed. Tars are in the page cache, or, `cold`, put out of it before each turn
    plan        CPU seconds to plan an epoch of a million clips and to find the place to go on from; padding; what the
                dearest of 64 ranks has to do, by the mean
    training    useful tokens of packs and of buckets: `benchmarks/buckets.py`
    ingest      frames a second of one core, from video files to shards, against PyAV decoding the same files

The loader verifies a CRC-32 of every byte, reads captions and lays clips into packs in a drawn order; the others do not
verify, and give clips as they lie. `raw` throws away what it reads: it uses one small piece of memory again and again,
which stays in a cache of the core. `raw, kept` reads into the memory of eight packs in turns; `raw + CRC-32` verifies.
The ways take turns; ratios are of the same turn. Ingest is compared by CPU seconds, its children's included: other
programs slow these less.
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
from benchmarks.record import surroundings, write_record
from megasora.build import patch_dim
from megasora.config import Config, load
from megasora.data.shard_writer import BlockWriter, write_manifest
from megasora.data.loader import PackLoader
from megasora.data.mixture import open_mixture
from megasora.data.pack import Record
from megasora.data.packing_plan import Cursor, PackingPlan, assign_packs_to_ranks
from megasora.ingest import ingest
from megasora.model.flops import attention_break_even_tokens
from megasora.testing.mixes import heavy_grids, heavy_mix
from megasora.text import build_text_encoder

PRESET = Path(__file__).resolve().parents[1] / "configs" / "dit_7b.yaml"  # whose arithmetic is counted
SMALL = [  # the model whose steps are timed
    "model.width=64", "model.depth=2", "model.heads=2", "codec.channels=16", "run.dtype=float32",
]  # fmt: skip
CAPTION = "a red circle moves slowly over a striped background while the camera pans to the left"
CHUNK = 1 << 20  # bytes that a raw read takes at once
RAW, KEPT, CHECKED = "raw", "raw, kept", "raw + CRC-32"
WEBDATASET, STREAMING = "webdataset", "MosaicML Streaming"
COLD_RAW, COLD = "raw, cold", "loader, 4 threads, cold"
RESUME_REPEATS = 2
BITS_A_PIXEL = 0.14  # of the videos that are ingested

# ---- the loader


@dataclass(frozen=True)
class Amount:
    clips: int
    bytes: int  # of the tars
    seconds: float
    cpu_seconds: float = 0.0  # of all threads


@dataclass(frozen=True)
class Loading:
    way: str
    clips_per_second: list[float]  # of each turn
    clips_per_cpu_second: list[float]
    gb_per_second: list[float]  # 10^9 bytes
    of_raw: list[float]  # bytes a second, by those of the raw read that is cold where this is
    of_raw_cpu: list[float]  # bytes a CPU second
    of_webdataset: list[float]  # clips a second
    of_webdataset_cpu: list[float]  # clips a CPU second


def write_shards(folder: Path, grids_N3: np.ndarray, width: int, shard_mib: int) -> None:
    """Clips of noise, `width` numbers a token; captions as long as CAPTION, of a language of 10^5 words."""
    draw, speak, length = torch.Generator().manual_seed(0), np.random.default_rng(0), len(CAPTION.split())
    with BlockWriter(folder, 0, shard_mib << 20) as writer:
        for number, (t, h, w) in enumerate(grids_N3.tolist()):
            patches_LP, native = torch.randn(t * h * w, width, generator=draw), (16.0 * h, 16.0 * w, 4.0 * t, 8.0)
            caption = " ".join(f"word{rank % 100_000}" for rank in speak.zipf(1.2, length))  # by Zipf's law
            record = Record(number, patches_LP, (t, h, w), torch.zeros(0), native, caption)
            writer.add("train", record, {"source": f"{number}.mp4", "sha256": "0" * 64})
        writer.commit({}, {})
    write_manifest(folder, "noise", "bytes-16", [1, 1, 1], 1, {})


def read_raw(tars: list[Path], clips: int, checked: bool, memory: list[bytearray] | None = None) -> Amount:
    """Into each of `memory` in turns."""
    views = itertools.cycle([memoryview(piece) for piece in memory or [bytearray(CHUNK)]])
    total, start = 0, time.perf_counter()
    for path in tars:
        checksum = 0
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(view := next(views)):
                total += count
                checksum = crc32(view[:count], checksum) if checked else 0
    return Amount(clips, total, time.perf_counter() - start)


def run_loader(config: Config, threads: int) -> Amount:
    """Whole steps of an epoch, from the first that is asked for."""
    clips = open_mixture(config.data, "train")
    encoder = build_text_encoder(config.text)
    length = attention_break_even_tokens(config.model, patch_dim(config))
    loader = PackLoader(
        clips, replace(config.data, reader_threads=threads), 0, lambda caption: encoder.encode([caption])[0], length
    )
    tokens = int(clips.tokens_I.sum())
    size_of = clips.datasets[0].index.rows["record"]["size"]
    seen, total, start = 0, 0, time.perf_counter()
    steps = iter(loader)
    for step in itertools.islice(steps, tokens // (config.data.tokens_per_pack * config.data.packs_per_step)):
        for pack in step.packs:
            seen += pack.num_segments
            total += int(size_of[pack.sample_ids_G.numpy()].sum())
    seconds = time.perf_counter() - start
    steps.close()
    return Amount(seen, total, seconds)


def run_webdataset(tars: list[Path]) -> Amount:
    import webdataset

    seen, start = 0, time.perf_counter()
    for clip in webdataset.WebDataset([str(path) for path in tars], shardshuffle=False):
        decode(clip["patches.f16"], clip["meta.json"], clip["caption.txt"])
        seen += 1
    return Amount(seen, sum(path.stat().st_size for path in tars), time.perf_counter() - start)


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
    seen, start = 0, time.perf_counter()
    for clip in dataset:
        decode(clip["patches"], clip["meta"], clip["caption"])
        seen += 1
    return Amount(seen, sum(path.stat().st_size for path in tars), time.perf_counter() - start)


def put_out_of_cache(tars: list[Path]) -> None:
    for path in tars:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def measure_loader(folder: Path, clips: int, budget: int, threads: list[int], turns: int) -> tuple[list[Loading], dict]:
    """Every way on the same tars, in `folder`, which are written first; and what was in them."""
    config = load(
        None,
        [f"data.shards={folder / 'shards'}", f"data.tokens_per_pack={budget}", "data.packs_per_step=2"],
    )
    grids = heavy_grids(budget, clips, 0)
    write_shards(folder / "shards", grids, patch_dim(config), 64)
    tars = sorted((folder / "shards").glob("*.tar"))
    packs = [bytearray(2 * patch_dim(config) * budget) for _ in range(8)]

    def cold(run: Callable[[], Amount]) -> Amount:
        put_out_of_cache(tars)
        return run()

    ways: dict[str, Callable[[], Amount]] = {
        RAW: lambda: read_raw(tars, clips, False),
        KEPT: lambda: read_raw(tars, clips, False, packs),
        CHECKED: lambda: read_raw(tars, clips, True),
        WEBDATASET: lambda: run_webdataset(tars),
        **{f"loader, {n} threads": lambda n=n: run_loader(config, n) for n in threads},
    }
    if importlib.util.find_spec("streaming"):
        write_streaming(folder / "streaming", tars)
        ways[STREAMING] = lambda: run_streaming(folder / "streaming", tars)
    ways |= {
        COLD_RAW: lambda: cold(lambda: read_raw(tars, clips, False)),
        COLD: lambda: cold(lambda: run_loader(config, 4)),
    }
    found: dict[str, list[Amount]] = {way: [] for way in ways}
    for turn in range(turns + 1):
        for way, run in ways.items():
            before = cpu_seconds()
            amount = run()
            if turn > 0:
                found[way].append(replace(amount, cpu_seconds=cpu_seconds() - before))
    per_second = {way: [a.clips / a.seconds for a in amounts] for way, amounts in found.items()}
    per_cpu = {way: [a.clips / a.cpu_seconds for a in amounts] for way, amounts in found.items()}
    gb = {way: [a.bytes / a.seconds / 1e9 for a in amounts] for way, amounts in found.items()}
    gb_cpu = {way: [a.bytes / a.cpu_seconds / 1e9 for a in amounts] for way, amounts in found.items()}
    raw = {way: COLD_RAW if "cold" in way else RAW for way in ways}
    results = [
        Loading(
            way, per_second[way], per_cpu[way], gb[way],
            ratios(gb[way], gb[raw[way]]), ratios(gb_cpu[way], gb_cpu[raw[way]]),
            ratios(per_second[way], per_second[WEBDATASET]), ratios(per_cpu[way], per_cpu[WEBDATASET]),
        )
        for way in ways
    ]  # fmt: skip
    size = sum(path.stat().st_size for path in tars)
    return results, {"clips": clips, "tokens": int(grids.prod(1).sum()), "tars": len(tars), "bytes": size}


def ratios(a: list[float], b: list[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


# ---- the plan


@dataclass(frozen=True)
class Planning:
    budget: int
    clips: int
    windows: int
    packs: int
    plan_cpu_seconds: float  # of all windows of an epoch; one thread does it
    resume_cpu_seconds: float  # from nothing to the first step, where that takes longest: in the second epoch
    padding: float  # fraction of the slots of an epoch
    dearest_over_mean: dict[str, float]  # packs a rank and step -> of a step's ranks, mean over an epoch
    high_over_mean: dict[str, float]  # of 999 in a thousand steps it is no more
    worst_over_mean: dict[str, float]  # the step where it is largest


def measure_plan(budget: int, clips: int, ranks: int, packs_a_rank: list[int], length: int) -> Planning:
    """`length`: see PackingPlan's `attention_break_even_tokens`."""
    tokens, window = heavy_mix(budget, clips, 0), load(None, []).data.packing_window

    def plan(packs_per_step: int) -> PackingPlan:
        return PackingPlan([tokens], [1.0], budget, packs_per_step, window, length, 0)

    start = time.process_time()
    whole = plan(ranks)
    packs = sum(len(whole.arranged(0, w, 0).packs) for w in range(whole.windows))
    plan_cpu_seconds = time.process_time() - start

    resume_cpu = []
    for w in range(whole.windows):
        middle = len(whole.arranged(1, w, 0).packs) // 2
        times = []
        for _ in range(RESUME_REPEATS):
            start = time.process_time()
            next(plan(ranks).steps(Cursor(1, w, middle)))
            times.append(time.process_time() - start)
        resume_cpu.append(min(times))

    dearest = {n: [rank_balance(costs, ranks) for costs in step_costs(plan(ranks * n))] for n in packs_a_rank}
    return Planning(
        budget, clips, whole.windows, packs, plan_cpu_seconds, max(resume_cpu),
        1 - int(tokens.sum()) / (packs * budget),
        {str(n): float(np.mean(of)) if of else 1.0 for n, of in dearest.items()},
        {str(n): float(np.quantile(of, 0.999)) if of else 1.0 for n, of in dearest.items()},
        {str(n): max(of, default=1.0) for n, of in dearest.items()},
    )  # fmt: skip


def step_costs(plan: PackingPlan) -> Iterator[np.ndarray]:
    """Of the packs of each step of the first epoch."""
    for step in itertools.takewhile(lambda step: step.next_cursor.epoch == 0, plan.steps(Cursor())):
        yield step.costs


def rank_balance(costs: np.ndarray, ranks: int) -> float:
    sums = costs[assign_packs_to_ranks(costs, ranks)].sum(1)
    return float(sums.max() / sums.mean())


# ---- ingest


@dataclass(frozen=True)
class Ingesting:
    way: str
    frames_per_second: list[float]  # of a core, by CPU seconds, of each turn
    wall_frames_per_second: list[float]
    ingest_of_this: list[float]


def write_videos(folder: Path, number: int, frames: int, height: int, width: int) -> None:
    """H.264 at the rate of web video (3 Mbit/s at 720p): a camera that pans over a grainy texture."""
    import av

    folder.mkdir()
    for clip in range(number):
        rng = np.random.default_rng(clip)
        world = np.zeros((height + frames, width + frames, 3), np.float32)
        for cell in (128, 32, 8):
            coarse = rng.normal(0, cell**0.5, (world.shape[0] // cell + 2, world.shape[1] // cell + 2, 3))
            world += (
                np.kron(coarse, np.ones((cell, cell, 1)))[: world.shape[0], : world.shape[1]].astype(np.float32) * 3
            )
        with av.open(str(folder / f"{clip}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=24, options={"preset": "veryfast"})
            stream.bit_rate = int(BITS_A_PIXEL * 24 * height * width)
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
    """Frames that were decoded, on one thread."""
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
    with contextlib.redirect_stdout(io.StringIO()):
        manifest = ingest(folder, out, load(None, ["ingest.workers=1"]))
    return manifest.splits["train"]["frames"]


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(of.ru_utime + of.ru_stime for of in used)


def measure_ingest(
    folder: Path, number: int, frames: int, height: int, width: int, turns: int
) -> tuple[list[Ingesting], dict]:
    videos = folder / "videos"
    write_videos(videos, number, frames, height, width)
    ways: dict[str, Callable[[int], int]] = {
        "PyAV, decoded": lambda turn: decode_videos(videos, to_rgb=False),
        "PyAV, decoded to RGB": lambda turn: decode_videos(videos, to_rgb=True),
        "ingest": lambda turn: ingest_videos(videos, folder / f"ingested-{turn}"),
    }
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    wall: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(turns + 1):
        for way, run in ways.items():
            start, before = time.perf_counter(), cpu_seconds()
            count = run(turn)
            if count != number * frames:
                raise RuntimeError(f"{way} gave {count} frames of {number * frames}")
            if turn > 0:
                cpu[way].append(count / (cpu_seconds() - before))
                wall[way].append(count / (time.perf_counter() - start))
    size = sum(path.stat().st_size for path in videos.glob("*.mp4"))
    about = {"videos": number, "frames": frames, "height": height, "width": width, "bytes": size}
    return [Ingesting(way, cpu[way], wall[way], ratios(cpu["ingest"], cpu[way])) for way in ways], about


# ---- what is shown


def spread(values: list[float], form: str = ".2f") -> str:
    return f"{np.median(values):{form}} ({min(values):{form}} - {max(values):{form}})"


def table_of(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def loader_table(results: list[Loading], about: dict) -> Table:
    title = f"{about['clips']:,} clips, {about['bytes'] / 1e6:,.0f} MB in {about['tars']} tars; median (least - most)"
    columns = ["", "clips/s", "GB/s", "of raw", "times webdataset", "clips/CPU s", "of raw", "times webdataset"]
    rows = [
        [r.way, spread(r.clips_per_second, ",.0f"), spread(r.gb_per_second), spread(r.of_raw), spread(r.of_webdataset)]
        + [f"{np.median(r.clips_per_cpu_second):,.0f}", spread(r.of_raw_cpu), spread(r.of_webdataset_cpu)]
        for r in results
    ]
    return table_of(title, columns, rows)


def plan_table(results: list[Planning], ranks: int) -> Table:
    several = results[0].dearest_over_mean
    columns = [
        "tokens of a pack", "packs", "plan an epoch, CPU s", "resume, CPU s", "padding",
        *(f"dearest / mean of {ranks},\n{n} packs a rank (99.9 %, worst step)" for n in several),
    ]  # fmt: skip
    rows = [
        [
            f"{r.budget:,}",
            f"{r.packs:,}",
            f"{r.plan_cpu_seconds:.2f}",
            f"{r.resume_cpu_seconds:.2f}",
            f"{r.padding:.4%}",
        ]
        + [f"{r.dearest_over_mean[n]:.4f} ({r.high_over_mean[n]:.3f}, {r.worst_over_mean[n]:.3f})" for n in several]
        for r in results
    ]
    return table_of(f"{results[0].clips:,} clips, {results[0].windows} windows", columns, rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file for every number")
    parser.add_argument("--turns", type=int, default=3, help="times that each way of loading and of ingest is measured")
    parser.add_argument(
        "--folder", type=Path, help="where shards and videos are put for the while; else, for temporary"
    )
    parser.add_argument("--load-clips", type=int, default=4800, help="in packs of 16,384 tokens, about 0.25 MB each")
    parser.add_argument("--plan-clips", type=int, default=1_000_000)
    parser.add_argument("--budgets", type=int, nargs="+", default=[8192, 65_536, 1 << 20], help="tokens of a pack")
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--bucket-clips", type=int, default=50_000, help="whose arithmetic is counted")
    parser.add_argument("--steps", type=int, default=8, help="of each way of training that is timed, two turns of them")
    parser.add_argument("--tokens", type=int, default=4096, help="of a pack in these steps")
    parser.add_argument("--videos", type=int, nargs=4, default=[4, 120, 720, 1280], metavar=("N", "FRAMES", "H", "W"))
    options = parser.parse_args(arguments)

    head, console = surroundings(), Console(width=156)
    torch.set_num_threads(1)
    preset = load(str(PRESET), [])
    length = attention_break_even_tokens(preset.model, patch_dim(preset))
    body: dict[str, object] = {"load_average": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        loading, about = measure_loader(folder, options.load_clips, 16_384, [0, 1, 4], options.turns)
        console.print(loader_table(loading, about))
        missing = [] if any(r.way == STREAMING for r in loading) else [STREAMING]
        for way in missing:
            console.print(f"{way} is not installed")
        body["loader"] = {**about, "not_installed": missing, "results": [asdict(r) for r in loading]}

        plans = [measure_plan(budget, options.plan_clips, options.ranks, [1, 4], length) for budget in options.budgets]
        console.print(plan_table(plans, options.ranks))
        body["plan"] = {"ranks": options.ranks, "results": [asdict(r) for r in plans]}

        counted = [r for n in (1, options.ranks) for r in count_arithmetic(preset, length, options.bucket_clips, n)]
        title = f"{options.bucket_clips:,} clips in packs of {preset.data.tokens_per_pack:,}, arithmetic of dit_7b"
        columns = ["", "ranks", "useful tokens a GFLOP", "packs / this", "useful / computed", "kept", "dearest / mean"]
        rows = [
            [r.way, str(r.ranks), f"{r.tokens_per_gflop:.4f}", f"{r.packs_over_this:.2f}"]
            + [f"{r.useful_of_computed:.1%}", f"{r.kept_of_clips:.1%}", f"{r.dearest_over_mean:.3f}"]
            for r in counted
        ]
        console.print(table_of(title, columns, rows))
        small = load(None, small_settings(options.tokens))
        small_length = attention_break_even_tokens(small.model, patch_dim(small))
        timed = measure_seconds(small, small_length, options.bucket_clips // 5, options.steps, 2)
        rows = [[r.way, spread(r.tokens_per_second, ",.0f"), spread(r.packs_over_this)] for r in timed]
        title = f"packs of {options.tokens:,}, width 64, 2 blocks, CPU seconds"
        console.print(table_of(title, ["", "useful tokens a second", "packs / this"], rows))
        body["training"] = {
            "preset": PRESET.stem, "tokens_per_pack": preset.data.tokens_per_pack, "clips": options.bucket_clips,
            "arithmetic": [asdict(r) for r in counted], "settings": small_settings(options.tokens),
            "seconds": [asdict(r) for r in timed],
        }  # fmt: skip

        ingested, about = measure_ingest(folder, *options.videos, options.turns)
        title = f"{about['videos']} videos of {about['frames']} frames of {about['height']}x{about['width']}, one core"
        rows = [
            [
                r.way,
                spread(r.frames_per_second, ".0f"),
                spread(r.wall_frames_per_second, ".0f"),
                spread(r.ingest_of_this),
            ]
            for r in ingested
        ]
        columns = ["", "frames a CPU second", "frames a second", "ingest / this, CPU"]
        console.print(table_of(title, columns, rows))
        body["ingest"] = {**about, "results": [asdict(r) for r in ingested]}
    if options.out:
        write_record(options.out, head, body)
        console.print(f"wrote {options.out}")


def small_settings(tokens: int) -> list[str]:
    return [*SMALL, f"data.tokens_per_pack={tokens}"]


if __name__ == "__main__":
    main()
