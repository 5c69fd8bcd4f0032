"""torchrun --standalone --nproc-per-node N tools/gpu/trace_overlap.py OUT.json [--width 5120 ...]

Which share of the communication of context and tensor parallelism runs while matrices or attention are computed, from
traces of torch.profiler, on N >= 2 GPUs of one node:

    ring                 parallel.context=N, keys along a ring
    ulysses, G groups    parallel.context=N, parallel.ulysses=N, heads exchanged in G groups; "chosen" marks the number
                         that head_groups takes. Where another is faster, its constants are wrong for this GPU and link
    tensor, collectives | symmetric memory     parallel.tensor=N
    ... keep_attention   the same with model.recompute=keep_attention

Each is `--depth` blocks of Wan-14B's shape (by default), forward and backward, on one pack of one long clip and four
short ones. Reported, of the slowest rank: the time of a pass, that of all communication kernels, and the share of it in
which a kernel that computes runs too. NCCL's kernels also last while they wait for a slower rank.

REHEARSE=1 on a CPU: gloo, tiny, events of gloo and of operators for kernels. Shows that it runs, and says nothing
about overlap.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megasora.build import patch_dim
from megasora.config import load
from megasora.data.pack import Record, make_batch
from megasora.device_transfer import to_device
from megasora.parallel import ulysses
from megasora.parallel.mesh import build_mesh
from megasora.parallel.share import share_pack
from megasora.parallelize import build_local_model

REHEARSE = bool(os.environ.get("REHEARSE"))
COMMUNICATION = {  # by category of event: names of what communicates
    "kernel": r"nccl|symm_mem|symmetric_memory",
    "gpu_memcpy": r"PtoP",  # symmetric memory copies from GPU to GPU
    "user_annotation": r"^gloo:",
}
COMPUTATION = {"kernel": r"", "cpu_op": r"^aten::"}  # all others; a copy within a GPU is none
WARM_UPS, TIMED = (1, 1) if REHEARSE else (3, 5)
MAX_GROUPS = 5
Interval = tuple[float, float]


def union(intervals: list[Interval]) -> list[Interval]:
    """The same times as disjoint intervals, in rising order."""
    result: list[Interval] = []
    for start, stop in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(stop, result[-1][1])
        else:
            result.append((start, stop))
    return result


def common_time(a: list[Interval], b: list[Interval]) -> float:
    """Time that is in both; each consists of disjoint intervals in rising order."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def overlap(trace: dict) -> dict[str, float]:
    """Milliseconds of communication and of the part of it in which something is computed, and their quotient."""
    times: dict[bool, list[Interval]] = {True: [], False: []}
    for event in trace["traceEvents"]:
        if event.get("ph") == "X":
            communicates, computes = (
                event["cat"] in patterns and re.search(patterns[event["cat"]], event["name"]) is not None
                for patterns in (COMMUNICATION, COMPUTATION)
            )
            if communicates or computes:
                times[communicates].append((event["ts"], event["ts"] + event["dur"]))
    communication = union(times[True])
    total, hidden = sum(stop - start for start, stop in communication), common_time(communication, union(times[False]))
    return {"communication_ms": total / 1e3, "overlapped_ms": hidden / 1e3, "share": hidden / total if total else 0.0}


def heads_in(groups: int):
    """A head_groups of so many groups."""

    def head_groups(heads: int) -> list[slice]:
        bounds = [group * heads // groups for group in range(groups + 1)]
        return [slice(*pair) for pair in pairwise(bounds)]

    return head_groups


def variants(ranks: int, heads: int) -> dict[str, tuple[list[str], object]]:
    """{name: (settings, what is patched meanwhile)}."""
    context, tensor, keep = f"parallel.context={ranks}", f"parallel.tensor={ranks}", "model.recompute=keep_attention"
    all_ulysses, chosen = [context, f"parallel.ulysses={ranks}"], len(ulysses.head_groups(heads // ranks))
    result: dict[str, tuple[list[str], object]] = {"ring": ([context], nullcontext())}
    for groups in range(1, min(MAX_GROUPS, heads // ranks) + 1):
        name = f"ulysses, {groups} groups" + (", chosen" if groups == chosen else "")
        result[name] = all_ulysses, patch.object(ulysses, "head_groups", heads_in(groups))
    result["ulysses, keep_attention"] = [*all_ulysses, keep], nullcontext()
    result["tensor, collectives"] = [tensor], nullcontext()
    result["tensor, symmetric memory"] = [tensor, "parallel.symmetric_memory=true"], nullcontext()
    return result


def build_pack(config):
    """One clip of three quarters of the pack, and four short ones."""
    tokens = config.data.tokens_per_pack
    records = []
    for i, length in enumerate([3 * tokens // 4, *[tokens // 16] * 4]):
        draw = torch.Generator().manual_seed(i)
        patches, words = torch.randn(length, patch_dim(config), generator=draw), torch.zeros(8, 16, dtype=torch.int64)
        records.append(Record(i, patches, (length, 1, 1), words, (64.0, 64.0, 4.0 * length - 3, 8.0), "a caption"))
    return make_batch(records, tokens)


def measure(settings: list[str], device: torch.device, folder: str) -> dict[str, object]:
    """Time of a pass and overlap, of this rank."""
    config = load(None, settings)
    mesh = build_mesh(config.parallel, device.type)
    local = build_local_model(config, device, mesh)
    model = local.stages[0].to(torch.float32 if REHEARSE else torch.bfloat16)
    share = to_device(share_pack(build_pack(config), config, mesh), device)

    def run() -> None:
        model.zero_grad()
        model(share).float().square().sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(WARM_UPS):
        run()
    seconds = []
    for _ in range(TIMED):
        dist.barrier()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    activities = [ProfilerActivity.CPU if device.type == "cpu" else ProfilerActivity.CUDA]
    dist.barrier()
    with profile(activities=activities, acc_events=True) as profiler:
        run()
    path = Path(folder) / "trace.json"
    profiler.export_chrome_trace(str(path))
    milliseconds = 1e3 * sorted(seconds)[len(seconds) // 2]
    return {"ms": milliseconds, **overlap(json.loads(path.read_text())), "notices": local.notices}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=64 if REHEARSE else 5120)
    parser.add_argument("--heads", type=int, default=8 if REHEARSE else 40)
    parser.add_argument("--tokens", type=int, default=256 if REHEARSE else 36_864)
    parser.add_argument("--depth", type=int, default=1 if REHEARSE else 2)
    parser.add_argument("--only", default="", help="regular expression for the names of what is measured")
    options = parser.parse_args()
    cuda = torch.cuda.is_available() and not REHEARSE
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks < 2 or options.heads % ranks or not (cuda or REHEARSE):
        parser.error(f"it needs 2 GPUs or more, whose number divides --heads {options.heads}; there are {ranks} ranks")
    shape = [
        f"model.width={options.width}", f"model.heads={options.heads}", f"model.depth={options.depth}",
        "model.qk_norm=across_heads", "model.modulation=shared", "model.mlp_ratio=2.7", "model.text_depth=0",
        "codec.channels=16", f"data.tokens_per_pack={options.tokens}", "model.deterministic=true",
    ]  # fmt: skip
    results = []
    for name, (settings, patched) in variants(ranks, options.heads).items():
        if re.search(options.only, name):
            with patched, tempfile.TemporaryDirectory() as folder:
                mine = measure([*shape, *settings], device, folder)
            of_ranks: list[dict] = [{} for _ in range(ranks)]
            dist.all_gather_object(of_ranks, mine)
            results.append({"name": name, **max(of_ranks, key=lambda result: result["ms"])})
            if rank == 0:
                r = results[-1]
                communication = f"communication {r['communication_ms']:8.2f} ms, {r['share']:.0%} of it hidden"
                print(f"{name:34} {r['ms']:9.2f} ms, {communication}", *r["notices"], sep="; ")
    if rank == 0:
        head = {"ranks": ranks, "device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            json.dumps({**head, **vars(options), "out": str(options.out), "results": results}, indent=1)
        )
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
