"""Checkpoints against the machine's limits and other programs: python -m benchmarks.checkpoint [--out FILE]

Two processes with one thread each hold about 2 GB of state: weights, EMA and both moments of equal parameters, fp32.

    stall       of an asynchronous save: the time until `CheckpointSaver.save` returns / a copy of the same bytes
    write       bytes per second of a save, until the checkpoint is visible / a write of the same bytes in blocks of the
                same size and an fsync. Early writeback: the kernel is asked after each block to begin with it
    checksums   a save / the same with a hash that costs nothing
    verify      bytes per second of `megasora checkpoint verify`, one process / a read of the same files, one thread
    load        bytes per second of `CheckpointLoader.load` by both / a read of the same files into the same memory
    others      stall, time until the files are on the disk, and bytes of torch.distributed.checkpoint and DeepSpeed
    hashes      bytes per second in memory, one thread, blocks as in a checkpoint

Cold: the files were removed from the page cache (posix_fadvise). All variants of a table run once in each round, in
rotating order, after a round that is not counted; ratios are within a round, and the median counts. Files are in a
temporary folder of --folder, which should be on the disk that is to be measured.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import blake3
from rich.console import Console
from rich.table import Table

from benchmarks.checkpoint_peers import measure_dcp, measure_deepspeed
from benchmarks.checkpoint_rank import Seconds, Sizes, measure_loads, measure_saves
from benchmarks.record import environment, write_record
from megasora.checkpoint.block_file import BLOCK_BYTES
from megasora.testing.spawn import run_ranks

PROCESSES = 2
HASHES: dict[str, Callable[[bytes], bytes]] = {
    "BLAKE3": lambda data: blake3.blake3(data).digest(),
    "SHA-256": lambda data: hashlib.sha256(data).digest(),
    "BLAKE2b": lambda data: hashlib.blake2b(data).digest(),
}
GOALS = {  # name: (table, numerator, denominator, bound, whether the ratio must be at most that)
    "stall / copy": ("saves", "stall", "copy", 1.1, True),
    "speed of a save / of a write + fsync": ("saves", "write + fsync", "save", 0.9, False),
    "speed of a save / of a write, early writeback": ("saves", "write, early writeback", "save", 0.9, False),
    "a save / without hashing": ("saves", "save", "save without hashing", 1.05, True),
    "speed of verify / of a read, cold": ("loads", "read by one process, cold", "verify, cold", 0.8, False),
    "speed of verify / of a read, warm": ("loads", "read by one process, warm", "verify, warm", 0.8, False),
    "speed of load / of a read, cold": ("loads", "read by all processes, cold", "load, cold", 0.8, False),
    "speed of load / of a read, warm": ("loads", "read by all processes, warm", "load, warm", 0.8, False),
}  # fmt: skip
OTHERS = "DCP async_save", "DeepSpeed"  # of each the variant with the shortest stall counts


def ratio(seconds: Seconds, over: str, under: str) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


def measure_hashes(num_bytes: int, rounds: int) -> dict[str, float]:
    """Bytes per second."""
    block, count = os.urandom(BLOCK_BYTES), max(1, num_bytes // BLOCK_BYTES)
    seconds: Seconds = {name: [] for name in HASHES}
    for _ in range(rounds):
        for name, digest in HASHES.items():
            start = time.perf_counter()
            for _ in range(count):
                digest(block)
            seconds[name].append(time.perf_counter() - start)
    return {name: count * BLOCK_BYTES / statistics.median(times) for name, times in seconds.items()}


def goals_of(results: dict[str, dict[str, Any]], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for name, (table, over, under, bound, is_most) in GOALS.items():
        rows.append(goal(name, ratio(results[table]["seconds"], over, under), bound, is_most))
    for program in OTHERS:
        least = min(row["stall_over_megasora"] for row in others if row["program"].startswith(program))
        rows.append(goal(f"stall of {program} / of MegaSora", least, 2.0, False))
    return rows


def goal(name: str, value: float, bound: float, is_most: bool) -> dict[str, Any]:
    is_reached = value <= bound if is_most else value >= bound
    return {"goal": name, "value": value, "bound": bound, "is_most": is_most, "is_reached": is_reached}


def others_of(results: dict[str, dict[str, Any]], num_bytes: int) -> list[dict[str, Any]]:
    """Of each program: stall and time until on disk, first and median, and the stall over MegaSora's."""
    own = statistics.median(results["dcp"]["seconds"]["MegaSora, stall"])
    rows = []
    for table in ("dcp", "deepspeed 1", "deepspeed 2"):
        found = results[table]
        for key in found["seconds"]:
            name, _, what = key.rpartition(", ")
            if what != "stall":
                continue
            stall, on_disk = (statistics.median(found["seconds"][f"{name}, {w}"]) for w in ("stall", "on disk"))
            rows.append(
                {
                    "program": name,
                    "first_stall": found["first"][key][0],
                    "stall": stall,
                    "on_disk": on_disk,
                    "num_bytes": num_bytes if name == "MegaSora" else found["num_bytes"],
                    "stall_over_megasora": stall / own,
                }
            )
    return rows


def table_of_seconds(title: str, results: dict[str, Any]) -> Table:
    table = Table("what", "seconds: median", "least", "most", "first", "GB/s", title=title)
    for name, times in results["seconds"].items():
        middle = statistics.median(times)
        columns = middle, min(times), max(times), results["first"][name][0]
        table.add_row(name, *(f"{x:.3f}" for x in columns), f"{results['num_bytes'] / middle / 1e9:.2f}")
    return table


def table_of_others(rows: list[dict[str, Any]]) -> Table:
    table = Table("program", "stall, s", "first", "on disk, s", "GB", "stall / MegaSora's", title="other programs")
    for row in rows:
        table.add_row(
            row["program"],
            *(f"{row[key]:.3f}" for key in ("stall", "first_stall", "on_disk")),
            f"{row['num_bytes'] / 1e9:.3f}",
            f"{row['stall_over_megasora']:.1f}",
        )
    return table


def table_of_goals(rows: list[dict[str, Any]]) -> Table:
    table = Table("ratio", "median", "goal", "", title="goals")
    for row in rows:
        sign, verdict = "<=" if row["is_most"] else ">=", "reached" if row["is_reached"] else "missed"
        table.add_row(row["goal"], f"{row['value']:.3f}", f"{sign} {row['bound']}", verdict)
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for all results")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the files are written, and removed")
    parser.add_argument("--gb", type=float, default=2.0, help="of the state of both processes")
    parser.add_argument("--parameters", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="8 MB, one round")
    options = parser.parse_args(arguments)
    if options.quick:
        options.gb, options.parameters, options.rounds = 0.008, 4, 1
    sizes = Sizes(int(options.gb * 1e9), options.parameters, options.rounds)
    others = Sizes(sizes.num_bytes, sizes.parameters, (sizes.rounds + 1) // 2)  # they are slow

    head, console, results = environment(), Console(width=120), {}
    hashes = measure_hashes(min(sizes.num_bytes, 1 << 28), sizes.rounds)
    with tempfile.TemporaryDirectory(prefix=".checkpoint-benchmark-", dir=options.folder) as folder:
        for name, measure, arguments in (
            ("saves", measure_saves, (sizes, Path(folder))),
            ("loads", measure_loads, (sizes, Path(folder))),
            ("dcp", measure_dcp, (others, Path(folder))),
            ("deepspeed 1", measure_deepspeed, (others, Path(folder), 1)),
            ("deepspeed 2", measure_deepspeed, (others, Path(folder), 2)),
        ):
            start = time.perf_counter()
            results[name] = run_ranks(measure, PROCESSES, *arguments, timeout=1800)[0]
            console.print(f"{name}: measured in {time.perf_counter() - start:.0f} s")
    rows = others_of(results, results["saves"]["num_bytes"])
    goals = goals_of(results, rows)
    for title in ("saves", "loads"):
        console.print(table_of_seconds(f"{title}, {results[title]['num_bytes'] / 1e9:.3f} GB", results[title]))
    console.print(table_of_others(rows))
    for name, speed in hashes.items():
        console.print(f"{name}: {speed / 1e9:.2f} GB/s")
    console.print(table_of_goals(goals))
    if options.out:
        body = {"processes": PROCESSES, "sizes": asdict(sizes), "hashes_bytes_per_s": hashes, "results": results}
        write_record(options.out, head, {**body, "others": rows, "goals": goals})
        console.print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
