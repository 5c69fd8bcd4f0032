"""tools/gpu/trace_overlap.py: how much of the communication in a trace overlaps with computation."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "gpu" / "trace_overlap.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("trace_overlap", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def event(name, start, stop, category="kernel"):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": stop - start}


def test_the_part_of_communication_is_counted_in_which_something_is_computed(tool):
    trace = [
        event("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage)", 1000, 4000),
        event("ncclDevKernel_AllGather_RING_LL", 3000, 5000),  # both at once from 3000 to 4000
        event("Memcpy PtoP (Device -> Device)", 8000, 9000, "gpu_memcpy"),
        event("flash_fwd_kernel", 500, 2000),
        event("nvjet_tst_128x256", 1500, 2500),
        event("nvjet_tst_128x256", 4500, 8500),
        event("Memcpy DtoD (Device -> Device)", 2500, 3000, "gpu_memcpy"),  # computes nothing
        event("nccl:all_gather", 0, 9000, "gpu_user_annotation"),  # lasts from the launch
        {"ph": "i", "name": "nccl", "ts": 0},
    ]
    measured = tool.overlap({"traceEvents": trace})
    assert measured == {"communication_ms": 5.0, "overlapped_ms": 2.5, "share": 0.5}


def test_without_communication_the_share_is_zero(tool):
    assert tool.overlap({"traceEvents": [event("flash_fwd_kernel", 0, 10)]})["share"] == 0


def test_the_variants_mark_the_number_of_groups_that_is_used(tool):
    names = [name for name in tool.variants(8, 40) if name.startswith("ulysses, ")]
    assert names == [
        "ulysses, 1 groups", "ulysses, 2 groups, chosen", "ulysses, 3 groups", "ulysses, 4 groups",
        "ulysses, 5 groups", "ulysses, keep_attention",
    ]  # fmt: skip
    for groups in (1, 2, 5):
        assert [h for heads in tool.heads_in(groups)(5) for h in range(5)[heads]] == list(range(5))


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_the_rehearsal_on_two_processes_measures_every_kind_of_layout(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    only = ["--only", "ring|2 groups|keep_attention|symmetric memory"]
    environment = {**os.environ, "REHEARSE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOOL.parents[2])}
    done = subprocess.run(
        [*torchrun, str(TOOL), str(tmp_path / "overlap.json"), *only],
        capture_output=True, text=True, timeout=140, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = {r["name"]: r for r in json.loads((tmp_path / "overlap.json").read_text())["results"]}
    assert list(results) == ["ring", "ulysses, 2 groups", "ulysses, keep_attention", "tensor, symmetric memory"]
    for name, result in results.items():
        assert result["ms"] > 0 and result["communication_ms"] > 0 and 0 <= result["share"] <= 1
        assert result["notices"] == (
            ["parallel.symmetric_memory=true is not used: it needs GPUs, not cpu"] if "symmetric" in name else []
        )
