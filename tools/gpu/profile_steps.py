"""profile_steps.py OUT.json FIRST COUNT CONFIG key=value ...: trains as megasora.train does and traces COUNT steps.

The steps from FIRST (counted from 0) are traced. Reports time by kind of kernel, the longest kernels, how often the
host waits for the GPU, and the gaps in which the GPU is idle, with what the CPU does meanwhile. REHEARSE=1: traces CPU
operators instead of kernels.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from bisect import bisect_right
from collections import Counter, defaultdict

import torch
from torch.profiler import ProfilerActivity, profile

from megasora import train, trainer
from megasora.training_steps import TrainingSteps

ON_GPU = torch.cuda.is_available() and not os.environ.get("REHEARSE")
KINDS = {  # the first pattern that a kernel's name matches
    "attention": r"flash|fmha|sdpa|attention",
    "matrix product": r"gemm|nvjet|cutlass|xmma|cublas|splitK|wgmma",
    "nccl": r"nccl",
    "optimizer": r"multi_tensor|lerp|adam",
    "Triton kernels of MegaSora": r"^\w+_kernel$",
    "reduction": r"reduce",
    "copy": r"Memcpy|copy",
    "fill": r"Memset|fill",
    "elementwise": r"elementwise|vectorized",
}
GAPS_OVER_US = (5, 50, 500)


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.I)), "other")


def complete_events(trace: dict, *categories: str) -> list[dict]:
    events = (e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("cat") in categories)
    return sorted(events, key=lambda e: e["ts"])


def busy_and_gaps(events: list[dict]) -> tuple[float, list[dict]]:
    """(microseconds in which any event runs, the gaps between them). `events` by start."""
    busy, end, gaps, previous = 0.0, events[0]["ts"], [], ""
    for event in events:
        start, stop = event["ts"], event["ts"] + event["dur"]
        if start > end:
            gaps.append({"us": start - end, "at": end, "after": previous[:80], "before": event["name"][:80]})
        if stop > end:
            busy += stop - max(end, start)
            end = stop
        previous = event["name"]
    return busy, gaps


def running_at(events: list[dict], starts: list[float], time: float, depth: int = 400) -> str:
    """The innermost CPU event that runs at `time`, among the `depth` that started last before."""
    last = bisect_right(starts, time)
    for event in reversed(events[max(0, last - depth) : last]):
        if event["ts"] + event["dur"] > time:
            return event["name"]
    return "Python"


def summarize(trace: dict, steps: int) -> dict:
    gpu = complete_events(trace, *(("kernel", "gpu_memcpy", "gpu_memset") if ON_GPU else ("cpu_op",)))
    if not gpu:
        return {"error": "nothing was traced"}
    cpu = complete_events(trace, "cpu_op", "cuda_runtime", "cuda_driver")
    cpu_starts = [event["ts"] for event in cpu]
    begin, span_us = gpu[0]["ts"], max(e["ts"] + e["dur"] for e in gpu) - gpu[0]["ts"]
    busy, gaps = busy_and_gaps(gpu)
    by_name, by_kind, runtime = defaultdict(list), Counter(), defaultdict(list)
    for event in gpu:
        by_name[event["name"]].append(event["dur"])
        by_kind[kind_of(event["name"])] += event["dur"]
    for event in complete_events(trace, "cuda_runtime", "cuda_driver"):
        runtime[event["name"]].append(event["dur"])

    def per_step(times: dict[str, list[float]], top: int) -> list[dict]:
        longest = sorted(times.items(), key=lambda item: -sum(item[1]))[:top]
        return [{"name": n[:160], "ms": sum(t) / 1e3 / steps, "calls": len(t) / steps} for n, t in longest]

    total = sum(by_kind.values())
    return {
        "steps": steps,
        "step_ms": span_us / 1e3 / steps,
        "busy_fraction": busy / span_us,
        "launches_per_step": len(gpu) / steps,
        "waits_per_step": sum(len(times) for name, times in runtime.items() if "Synchronize" in name) / steps,
        "copies_to_cpu_per_step": sum("DtoH" in e["name"] for e in gpu) / steps,
        "kinds": {k: {"ms_per_step": v / 1e3 / steps, "fraction": v / total} for k, v in by_kind.most_common()},
        "kernels_per_step": per_step(by_name, 40),
        "runtime_per_step": per_step(runtime, 14),
        "gap_ms_per_step": {
            f"over {us} us": sum(g["us"] for g in gaps if g["us"] > us) / 1e3 / steps for us in GAPS_OVER_US
        },
        "gaps": [
            {**gap, "at": (gap["at"] - begin) / 1e3, "cpu": running_at(cpu, cpu_starts, gap["at"] + gap["us"] / 2)}
            for gap in sorted(gaps, key=lambda g: -g["us"])[:30]
        ],
    }


def print_summary(s: dict) -> None:
    if "error" in s:
        print(s["error"])
        return
    print(
        f"step {s['step_ms']:.1f} ms, GPU busy {s['busy_fraction']:.1%}, {s['launches_per_step']:.0f} launches, "
        f"{s['copies_to_cpu_per_step']:.0f} copies to the CPU and {s['waits_per_step']:.1f} waits of the host per step"
    )
    for kind, figures in s["kinds"].items():
        print(f"  {kind:28} {figures['ms_per_step']:9.2f} ms per step {figures['fraction']:6.1%}")
    for kernel in s["kernels_per_step"][:14]:
        print(f"  {kernel['ms']:9.2f} ms {kernel['calls']:7.0f} x  {kernel['name'][:100]}")
    for gap in s["gaps"][:6]:
        kernels = f"after {gap['after'][:40]} before {gap['before'][:40]}"
        print(f"  gap {gap['us']:9.0f} us {kernels}, CPU in {gap['cpu'][:40]}")


class ProfiledSteps(TrainingSteps):
    """Traces the steps `first` to `first + count - 1` and writes their summary to `out`."""

    out, first, count = "", 0, 1
    profiler: profile | None = None

    def take(self, *arguments) -> None:
        if self.step == self.first:
            self.profiler = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])], acc_events=True
            )
            self.profiler.start()
        super().take(*arguments)
        if self.step == self.first + self.count and self.profiler is not None:
            self.finish()

    def finish(self) -> None:
        if ON_GPU:
            torch.cuda.synchronize()
        self.profiler.stop()
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            self.profiler.export_chrome_trace(file.name)
            with open(file.name, encoding="utf-8") as trace:
                summary = summarize(json.load(trace), self.count)
        self.profiler = None
        with open(self.out, "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=1)
        print_summary(summary)


if __name__ == "__main__":
    ProfiledSteps.out, ProfiledSteps.first, ProfiledSteps.count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    trainer.TrainingSteps = ProfiledSteps  # what the trainer takes its steps with
    sys.exit(train.main(sys.argv[4:]))
