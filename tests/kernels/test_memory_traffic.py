"""Memory traffic of operations against the least possible, counted in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from megasora.kernels import rows
from megasora.kernels.launch import INTERPRETED
from megasora.testing.memory_traffic import MemoryTraffic
from megasora.testing.operations import OPERATIONS, Size, backward, forward

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter, which is off beside a GPU")

# The proportions of a pack of 64K tokens or more: vectors of rows and of tiles, and the statistics of tokens and heads,
# are 1/128 of the activations.
LONG = Size(tokens=1024, width=128, head_dim=128, row_tokens=1024)
# Read by every program, or for every token of a program, and therefore cached.
IN_CACHE = ".frequency_P", ".weight_D", ".bias_D", ".q_weight", ".k_weight", ".shift_RD", ".scale_RD", ".gate_RD"


@pytest.fixture
def long_tiles(monkeypatch):
    monkeypatch.setattr(rows, "MIN_TILE_TOKENS", rows.tile_tokens_for(65_536))


@pytest.mark.usefixtures("long_tiles")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_traffic_is_within_5_percent_of_the_least(operation):
    size = replace(LONG, tokens=256) if "rope" in operation else LONG  # it has no rows, and is slow in the interpreter
    problem = OPERATIONS[operation](size, torch.bfloat16, "cpu")
    with MemoryTraffic() as traffic:
        outputs = forward(problem.triton, problem.inputs)
    backward_pass = backward(problem.inputs, outputs)
    traffic_of = {"forward": traffic}
    if backward_pass is not None:
        with MemoryTraffic() as traffic_of["backward"]:
            backward_pass()
    assert traffic_of.keys() == problem.least_bytes.keys()
    for direction, least in problem.least_bytes.items():
        bytes_of = {name: n for name, n in traffic_of[direction].by_argument.items() if not name.endswith(IN_CACHE)}
        assert 1 <= sum(bytes_of.values()) / least <= 1.05, (direction, bytes_of)


@triton.jit
def pairs_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i // 2, mask=i < n), mask=i < n)


@triton.jit
def add_kernel(x, total, BLOCK: tl.constexpr):
    tl.atomic_add(total + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)))


def test_masked_lanes_and_repeated_addresses_do_not_count():
    x, y = torch.arange(64.0), torch.zeros(64, dtype=torch.float64)
    with MemoryTraffic() as traffic:
        pairs_kernel[1,](x, y, 10, 64)
        pairs_kernel[1,](x, y, 6, 64)
    assert y[:12].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0]
    assert traffic.by_argument == {"pairs_kernel.x": (5 + 3) * 4, "pairs_kernel.y": (10 + 6) * 8}
    assert traffic.bytes == 8 * 4 + 16 * 8


def test_atomic_additions_read_and_write():
    x, total = torch.ones(16), torch.zeros(16)
    with MemoryTraffic() as traffic:
        add_kernel[2,](x, total, 16)
    assert total.tolist() == [2.0] * 16
    assert traffic.by_argument == {"add_kernel.x": 2 * 64, "add_kernel.total": 2 * 2 * 64}


def test_pytorch_operators_count_and_views_do_not():
    x, rows_of_x = torch.ones(8, 4), torch.ones(4)
    with MemoryTraffic() as traffic:
        y = x.T.contiguous()  # 128 bytes, read and written
        y[2:].copy_(y[:2])  # 2 x 8 elements, read and written
        x += rows_of_x.expand(8, 4)  # x and the 4 elements of 16 bytes are read, x is written
        torch.empty(1000)
    assert traffic.by_argument == {"aten.clone": 256, "aten.copy_": 128, "aten.add_": 128 + 16 + 128}
    with MemoryTraffic() as nothing:
        x.view(32)[3:].unflatten(0, (-1, 29)).detach()
    assert nothing.bytes == 0
