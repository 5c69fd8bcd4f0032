"""Bytes that operations move, against the least there is; counted in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from megasora.kernels import rows
from megasora.kernels.launch import INTERPRETED
from megasora.testing.operations import OPERATIONS, Size, backward, forward
from megasora.testing.traffic import Traffic

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter, which does not run beside a GPU")

# A long pack in small. Beside the activations stand vectors of rows and of runs, and a few numbers for each token and
# head: one part in 128 of the activations here, in a pack of 64K tokens or more, of any width.
LONG = Size(tokens=1024, width=128, head_dim=128, row=1024)
# What every program reads alike, however long the pack is, comes from a cache.
IN_CACHE = ".frequency_P", ".weight_D", ".bias_D", ".q_weight", ".k_weight"


@pytest.fixture
def long_runs(monkeypatch):
    monkeypatch.setattr(rows, "RUN", {0: rows.RUN[65_536]})


@pytest.mark.usefixtures("long_runs")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_moves_little_more_than_it_must(operation):
    size = replace(LONG, tokens=256) if "rope" in operation else LONG  # it has no rows, and takes the interpreter long
    problem = OPERATIONS[operation](size, torch.bfloat16, "cpu")
    with Traffic() as there:
        outputs = forward(problem.ours, problem.inputs)
    backward_pass = backward(problem.inputs, outputs)
    moved = {"forward": there}
    if backward_pass is not None:
        with Traffic() as moved["backward"]:
            backward_pass()
    assert moved.keys() == problem.least_bytes.keys()
    for name, least in problem.least_bytes.items():
        bytes_of = {place: n for place, n in moved[name].by_place.items() if not place.endswith(IN_CACHE)}
        assert 1 <= sum(bytes_of.values()) / least <= 1.05, (name, bytes_of)


@triton.jit
def pairs_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i // 2, mask=i < n), mask=i < n)


@triton.jit
def add_kernel(x, total, BLOCK: tl.constexpr):
    tl.atomic_add(total + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)))


def test_lanes_that_are_masked_or_share_an_address_move_nothing():
    x, y = torch.arange(64.0), torch.zeros(64, dtype=torch.float64)
    with Traffic() as traffic:
        pairs_kernel[1,](x, y, 10, 64)
        pairs_kernel[1,](x, y, 6, 64)
    assert y[:12].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0]
    assert traffic.by_place == {"pairs_kernel.x": (5 + 3) * 4, "pairs_kernel.y": (10 + 6) * 8}
    assert traffic.bytes == 8 * 4 + 16 * 8


def test_what_is_added_to_in_place_is_read_and_written():
    x, total = torch.ones(16), torch.zeros(16)
    with Traffic() as traffic:
        add_kernel[2,](x, total, 16)
    assert total.tolist() == [2.0] * 16
    assert traffic.by_place == {"add_kernel.x": 2 * 64, "add_kernel.total": 2 * 2 * 64}


def test_operators_around_the_kernels_count_and_views_do_not():
    x, rows_of_x = torch.ones(8, 4), torch.ones(4)
    with Traffic() as traffic:
        y = x.T.contiguous()  # 128 bytes, read and written
        y[2:].copy_(y[:2])  # 2 x 8 numbers, read and written
        x += rows_of_x.expand(8, 4)  # read, and 16 bytes of 4 numbers; written
        torch.empty(1000)
    assert traffic.by_place == {"aten.clone": 256, "aten.copy_": 128, "aten.add_": 128 + 16 + 128}
    with Traffic() as nothing:
        x.view(32)[3:].unflatten(0, (-1, 29)).detach()
    assert nothing.bytes == 0
