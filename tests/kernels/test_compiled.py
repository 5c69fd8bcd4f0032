"""Kernels compiled for A100 and H100, without a GPU: registers, shared memory, width of loads and stores."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

from megasora.kernels.launch import INTERPRETED
from megasora.kernels.rows import tile_tokens_for
from megasora.testing import compiled

SIZES = "1152x96", "1536x128", "3072x64", "3072x128", "5120x128"  # width x head dim
FEW_BYTES = 16  # that a thread may spill: versions of the compiler differ by so much, and it costs no time


def without_interpreter(*command: object) -> subprocess.CompletedProcess:
    """Runs Python in a process that compiles kernels; skips the test if there is no compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, check=False, timeout=600
    )
    if "CUDA tools are not complete" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return done


pytestmark = pytest.mark.timeout(600)  # compiling all kernels takes minutes on a busy machine


@pytest.fixture(scope="module", params=[(chip, dtype) for chip in (80, 90) for dtype in compiled.DTYPES], ids=str)
def kernels(request, tmp_path_factory) -> list[dict]:
    """The kernels of every operation and size, for one chip and dtype; compiled in one process."""
    path, (chip, dtype) = tmp_path_factory.mktemp("compiled") / "kernels.json", request.param
    without_interpreter(
        "-m", "megasora.testing.compiled", "--chip", chip, "--dtype", dtype,
        "--size", *SIZES, "--json", path,
    )  # fmt: skip
    return json.loads(path.read_text())


def describe(kernels: list[dict]) -> str:
    return "\n".join(
        f"{k['operation']}: {k['name']}, sm_{k['chip']}, {k['dtype']}, {k['width']}x{k['head_dim']}: {k['registers']} "
        f"registers, {k['spilled']} bytes spilled, {k['shared']} shared, {k['programs']} programs, "
        f"loads {k['loads']}, stores {k['stores']}"
        for k in kernels
    )


@pytest.mark.slow
def test_every_operation_fits_the_registers_and_the_shared_memory(kernels):
    assert {k["operation"] for k in kernels} == set(compiled.OPERATIONS)
    assert {f"{k['width']}x{k['head_dim']}" for k in kernels} == set(SIZES)
    limit = compiled.SHARED_LIMIT
    too_large = [k for k in kernels if k["spilled"] > FEW_BYTES or k["shared"] > limit[k["chip"]]]
    assert not too_large, describe(too_large)


@pytest.mark.slow
def test_loads_and_stores_are_wide(kernels):
    """At least 8 bytes per thread and instruction: 256 contiguous bytes or more per warp."""
    wide = [k for k in kernels if not k["name"].startswith("sum_")]  # these move few bytes
    narrow = [k for k in wide if max(map(int, k["loads"])) < 8 or max(map(int, k["stores"])) < 8]
    assert len(wide) > 20 and not narrow, describe(narrow)


# Of a kernel with one program for 1/528 of a pack, or a little less (rows.py): programs on a multiprocessor at least.
ROW_TILE_KERNELS = {
    ("adaln_modulate", "forward_kernel"): {1536: 4, 3072: 4, 5120: 4},
    ("adaln_modulate", "backward_kernel"): {1536: 4, 3072: 4, 5120: 2},
    ("residual_adaln", "forward_kernel"): {1536: 4, 3072: 4, 5120: 4},
    ("residual_adaln", "backward_kernel"): {1536: 4, 3072: 4, 5120: 2},
    ("gated_residual_adaln", "forward_kernel"): {1536: 4, 3072: 4, 5120: 4},
    ("gated_residual_adaln", "backward_kernel"): {1536: 2, 3072: 2, 5120: 2},
    ("gated_add", "forward_kernel"): {1536: 4, 3072: 4, 5120: 4},
    ("gated_add", "backward_kernel"): {1536: 4, 3072: 4, 5120: 4},
}
MULTIPROCESSORS = 132  # of an H100


def fill(programs: int, num_programs: int) -> float:
    """Time of `num_programs` programs of equal length, if all that fit ran all the time, over their time in waves."""
    on_each = num_programs / MULTIPROCESSORS
    if on_each <= programs:  # one wave: the time of the fullest multiprocessor
        return on_each / math.ceil(on_each)
    return on_each / programs / math.ceil(on_each / programs)


def test_fill_of_known_grids():
    assert fill(4, 528) == fill(2, 528) == fill(1, 132) == 1
    assert fill(1, 576) == pytest.approx(576 / 132 / 5) and fill(4, 576) == pytest.approx(576 / 528 / 2)


@pytest.mark.slow
def test_row_tile_kernels_load_16_bytes_and_fill_every_wave_of_an_h100(tmp_path):
    """In bf16: activations are loaded and stored in 16 bytes per thread, and the last wave is at least 9/10 full."""
    path = tmp_path / "kernels.json"
    without_interpreter(
        "-m", "megasora.testing.compiled", "--chip", 90, "--dtype", "bf16",
        "--size", "1536x128", "3072x128", "5120x128",
        "--operation", *dict.fromkeys(operation for operation, _ in ROW_TILE_KERNELS), "--json", path,
    )  # fmt: skip
    kernels = {(k["operation"], k["name"], k["width"]): k for k in json.loads(path.read_text())}
    for (operation, name), least in ROW_TILE_KERNELS.items():
        for width, programs in least.items():
            k = kernels[operation, name, width]
            assert not k["spilled"] and k["programs"] >= programs, describe([k])
            assert set(k["loads"]) == {"4", "16"}, describe([k])  # 4: indices and statistics of tokens
            assert set(k["stores"]) <= {"4", "16"} and k["stores"]["16"] > 0, describe([k])
            for tokens in (36_864, 37_888, 73_728):
                num_programs = math.ceil(tokens / tile_tokens_for(tokens))
                assert fill(k["programs"], num_programs) > 0.9, (tokens, describe([k]))


SCRIPT = """
import torch, triton, triton.language as tl
from megasora.testing.compiled import compiling_for

@triton.jit
def share_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i, mask=i < n)
    tl.store(y + i, values / tl.sum(values, 0), mask=i < n)

x = torch.arange(4096, dtype=torch.float32)
y = torch.zeros_like(x)
for chip in (80, 90):
    with compiling_for(chip) as kernels:
        share_kernel[1,](x, y, 64, 64, num_warps=1)
        share_kernel[1,](x, y, 64, 64, num_warps=1)
        share_kernel[1,](x, y, 4096, 4096, num_warps=1, maxnreg=32)
    small, large = kernels
    assert f"x: *fp32, y: *fp32, n: i32, BLOCK=64" == small.specialisation, small
    assert small.warps == 1 and small.loads == small.stores == {8: 1}, small
    assert small.spilled == 0 and 0 < small.registers <= 32, small
    assert large.spilled > 300, large
assert not y.any(), "nothing runs"
"""


def test_registers_and_widths_are_read_without_running_the_kernel(tmp_path):
    """64 elements are 8 bytes per thread; 4,096, all held until their sum is known, exceed 32 registers."""
    path = tmp_path / "compile_shares.py"
    path.write_text(SCRIPT)
    without_interpreter(path)


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled in this process")
def test_compiling_in_an_interpreting_process_raises():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), compiled.compiling_for(90):
        pass


PACKS = """
import torch
from megasora.testing import compiled
from megasora.testing.operations import OPERATIONS, Size

with compiled.compiling_for(90) as kernels:
    for name in OPERATIONS:
        versions = []
        for tokens, row_tokens in ((64, 4096), (65, 7), (96, 16), (1, 1)):  # also: one row, rows and tokens in sixteens
            compiled.launch_all(name, torch.bfloat16, Size(tokens, 96, 32, row_tokens))
            versions.append(len(kernels))
        assert versions == versions[:1] * 4, f"{name}: {versions} kernels after each pack"
"""


def test_a_kernel_is_compiled_once_for_all_packs(tmp_path):
    """Otherwise a run compiles for seconds at almost every step, as its packs differ."""
    path = tmp_path / "compile_packs.py"
    path.write_text(PACKS)
    without_interpreter(path)
