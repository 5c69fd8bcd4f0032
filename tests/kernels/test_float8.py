"""FP8 numbers and products against their definition in float64."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from agreement import TRITON_DEVICE, each_backend, on_gpu

from megasora.kernels.float8 import (
    E4M3,
    E5M2,
    Quantized,
    identity,
    power_of_2_scale,
    quantize,
    quantize_reference,
    scaled_matmul,
    why_not,
)
from megasora.kernels.launch import INTERPRETED
from megasora.testing.memory_traffic import MemoryTraffic

ROUNDING = {E4M3: (2**-4, 2**-10), E5M2: (2**-3, 2**-17)}  # of an element, of its scale
each_format = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
each_granularity = pytest.mark.parametrize("per_row", [True, False], ids=["per row", "per tensor"])


def matrix(rows=70, columns=100, seed=0):
    """Rows of very different sizes, one of zeros, one with the largest number of a format times a power of two."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=draw) * torch.logspace(-6, 6, rows)[:, None]
    x[3], x[5, 7] = 0, 448 * 2.0**15
    return x


def assert_same_numbers(q, expected, x, backend):
    assert torch.equal(q.scale.cpu(), expected.scale) and q.scale.dtype == torch.float32
    values, wanted = q.values.cpu().float(), expected.values.float()
    if backend == "triton" and INTERPRETED:  # its conversion truncates subnormal numbers, and 15.9 to 8 in place of 16
        is_up = torch.frexp(wanted).exponent > torch.frexp(x.float() / expected.scale).exponent
        is_exact = ~is_up & ((wanted.abs() >= torch.finfo(q.values.dtype).smallest_normal) | (x == 0))
        assert is_exact.float().mean() > 0.05
        values, wanted = values[is_exact], wanted[is_exact]
    assert torch.equal(values, wanted)


@each_format
@each_granularity
@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@each_backend
def test_values_and_scales_are_those_of_the_definition(backend, source, per_row, dtype):
    if backend == "triton" and (source == torch.float64 or INTERPRETED and source == torch.bfloat16):
        return  # the interpreter rounds halves, frequent in bf16, away from zero
    x = matrix().to(source)
    expected = quantize_reference(x, dtype, per_row)
    for view in (x, x.t().contiguous().t(), torch.cat((x, x), 1)[:, 100:]):  # of any strides
        for all_reduce_max in (identity, lambda amax: amax):  # in one pass, if it can be, and in two
            device = TRITON_DEVICE if backend == "triton" else "cpu"
            q = quantize(view.to(device), dtype, per_row, all_reduce_max, backend)
            assert_same_numbers(q, expected, x, backend)
            assert q.values.dtype == dtype and q.values.is_contiguous() and q.dtype == source


@each_format
@each_granularity
def test_an_element_is_rounded_once_and_nothing_saturates(per_row, dtype):
    x = matrix().double()
    q, (of_element, of_scale) = quantize(x, dtype, per_row), ROUNDING[dtype]
    assert ((q.dequantize() - x).abs() <= torch.maximum(of_element * x.abs(), of_scale * q.scale)).all()
    largest = x.abs().amax(1, keepdim=True) if per_row else x.abs().amax().view(1, 1)
    limit, used = torch.finfo(dtype).max * q.scale.double(), largest > 0
    assert (largest <= limit).all() and (largest[used] > limit[used] / 2).all()
    assert torch.equal(q.scale.log2(), q.scale.log2().round())


@each_format
def test_the_largest_numbers_are_exact_and_the_next_one_doubles_the_scale(dtype):
    limit = torch.finfo(dtype).max
    for exponent in (-100, -1, 0, 7, 60):
        largest = torch.tensor([[limit * 2.0**exponent]])
        assert power_of_2_scale(largest, dtype) == (2.0**exponent, 2.0**-exponent)
        assert quantize(largest, dtype, True).dequantize() == largest
        assert power_of_2_scale(largest.nextafter(largest * 2), dtype)[0] == 2.0 ** (exponent + 1)


@each_granularity
@each_backend
def test_zeros_stay_zeros_and_tiny_numbers_are_finite(backend, per_row):
    for value in (0.0, 2.0**-149, 2.0**-126, 3e-38):
        q = quantize(torch.full((2, 20), value, device=TRITON_DEVICE), E4M3, per_row, backend=backend)
        assert q.scale.isfinite().all() and (q.scale > 0).all() and q.values.float().isfinite().all()
        assert (q.dequantize() - value).abs().max() <= 2.0**-130


@each_format
@each_granularity
@each_backend
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_product_with_an_element_that_is_not_finite_is_not_finite(bad, backend, per_row, dtype):
    a, b = torch.ones(3, 16), torch.ones(16, 16)
    a[1, 5] = bad
    q = quantize(a.to(TRITON_DEVICE), dtype, per_row, backend=backend)
    b = quantize(b.to(TRITON_DEVICE), E4M3, per_row, backend=backend).t()
    y = scaled_matmul(
        Quantized(q.values.cpu(), q.scale.cpu(), q.dtype), Quantized(b.values.cpu(), b.scale.cpu(), b.dtype)
    )
    assert not y[1].isfinite().any()
    assert (y[[0, 2]] == 16).all() if per_row else not y.isfinite().any()


@each_granularity
def test_ranks_that_share_a_matrix_use_the_largest_element_of_all(per_row):
    x = matrix()
    whole, seen = quantize(x, E4M3, per_row), []
    amax = x.abs().amax(1, keepdim=True) if per_row else x.abs().amax().view(1, 1)

    def all_reduce_max(own):
        seen.append(own.shape)
        return torch.maximum(own, amax)

    halves = [quantize(half, E4M3, per_row, all_reduce_max) for half in (x[:, :50], x[:, 50:])]
    assert torch.equal(torch.cat([half.values.float() for half in halves], 1), whole.values.float())
    assert all(torch.equal(half.scale, whole.scale) for half in halves)
    assert seen == [whole.scale.shape] * 2


@each_granularity
@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_product_is_that_of_the_dequantized_matrices(source, per_row):
    draw = torch.Generator().manual_seed(1)
    a, b = matrix(24, 40).to(source), (torch.randn(32, 40, generator=draw) * 7).to(source)
    bias = torch.randn(32, generator=draw).to(source)
    a_q, b_q = quantize(a, E5M2 if not per_row else E4M3, per_row), quantize(b, E4M3, per_row).t()
    exact = (a_q.values.double() * a_q.scale) @ (b_q.values.double() * b_q.scale) + bias.double()
    y, scale = scaled_matmul(a_q, b_q, bias), exact.abs().amax(1, keepdim=True)
    assert y.dtype == source
    assert ((y.double() - exact).abs() <= scale * {torch.float64: 1e-13, torch.float32: 1e-6}.get(source, 2**-8)).all()
    out = torch.full_like(y, torch.nan)
    assert scaled_matmul(a_q, b_q, bias, out=out) is out and torch.equal(out, y)
    assert torch.equal(scaled_matmul(a_q[4:9], b_q, bias), y[4:9])


def test_matrices_are_handed_to_torch_as_it_accepts_them():
    """Its checks of layout, dims and scales run on the meta device."""
    for per_row in (True, False):
        a, b = (torch.empty(rows, 40, dtype=torch.bfloat16, device="meta") for rows in (5, 32))  # 40: padded to 48
        a_q, b_q = quantize(a, E4M3, per_row, backend="torch"), quantize(b, E4M3, per_row, backend="torch")
        y = scaled_matmul(a_q, b_q.t(), torch.empty(32, dtype=torch.bfloat16, device="meta"))
        assert (y.shape, y.dtype) == ((5, 32), torch.bfloat16)
        with pytest.raises(RuntimeError, match="mat2 must be col_major"):
            scaled_matmul(
                Quantized(a_q.values[:, :32].contiguous(), a_q.scale, a_q.dtype),
                Quantized(b_q.values[:, :32].t().contiguous(), b_q.scale.t(), b_q.dtype),
            )
        with pytest.raises(RuntimeError, match="divisible by 16"):
            scaled_matmul(a_q, b_q[:20].t())


@pytest.mark.parametrize("cuda, capability, per_row, reason", [
    ("13.0", (9, 0), True, None),
    ("13.0", (8, 9), False, None),
    ("13.0", (8, 9), True, "capability 8.9, and FP8 products with a scale per row need 9.0"),
    ("13.0", (8, 0), False, "capability 8.0, and FP8 products with a scale per tensor need 8.9"),
    (None, (9, 4), True, "not built for CUDA"),
])  # fmt: skip
def test_a_gpu_without_fp8_products_is_refused_with_what_it_lacks(monkeypatch, cuda, capability, per_row, reason):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = why_not(torch.device("cuda"), per_row)
    assert found is None if reason is None else reason in found
    assert why_not(torch.device("cpu"), per_row) is None


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter, which is off beside a GPU")
@each_granularity
def test_elements_are_read_once_after_their_maximum_is_known_or_with_it_and_one_byte_is_written(per_row):
    x = matrix(256, 384).bfloat16()
    for view, kernel in ((x, "rows_kernel" if per_row else "cast_kernel"), (x.t(), "cast_kernel")):
        with MemoryTraffic() as traffic:
            quantize(view, E4M3, per_row, backend="triton")
        moved = {name.partition(".")[2]: n for name, n in traffic.by_argument.items() if name.startswith(kernel)}
        assert (moved["x_MN"], moved["values_MN"]) == (2 * x.numel(), x.numel())
        assert moved["scale_M" if kernel == "rows_kernel" else "scale"] == 4 * (len(view) if per_row else 1)
        if kernel == "rows_kernel":
            assert traffic.bytes == 3 * x.numel() + 4 * len(x)


COMPILE = """
import torch
from megasora.kernels.float8 import E4M3, E5M2, quantize
from megasora.testing.compiled import compiling_for
x, wide = torch.zeros(128, 1536, dtype=torch.bfloat16), torch.zeros(128, 13_824, dtype=torch.bfloat16)
with compiling_for(90) as kernels:
    for dtype in (E4M3, E5M2):
        for per_row in (True, False):
            quantize(x, dtype, per_row, backend="triton")
            quantize(x.t(), dtype, per_row, backend="triton")
        quantize(wide, dtype, True, backend="triton")
for k in kernels:
    print(k.registers, k.spilled, k.shared, max(k.loads), max(k.stores))
"""


@pytest.mark.slow
def test_kernels_compile_for_an_h100_without_spilled_registers():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False)
    if "CUDA tools are not complete" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    lines = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(lines) == 10, done.stderr
    for registers, spilled, _, load, store in lines:
        assert registers <= 128 and spilled == 0 and load == 16 and store >= 4, lines


@on_gpu[0]
@on_gpu[1]
@each_granularity
@pytest.mark.parametrize("fast", [False, True])
def test_a_gpu_computes_the_emulated_product(fast, per_row):
    if why_not(torch.device("cuda"), per_row):
        pytest.skip(why_not(torch.device("cuda"), per_row))
    draw = torch.Generator().manual_seed(2)
    a, b = (torch.randn(rows, 1000, generator=draw).bfloat16() for rows in (300, 256))  # 1,000: padded
    for first in (E4M3,) if per_row else (E4M3, E5M2):
        on_cpu = quantize(a, first, per_row), quantize(b, E4M3, per_row).t()
        on_cuda = quantize(a.cuda(), first, per_row), quantize(b.cuda(), E4M3, per_row).t()
        assert all(torch.equal(x.values.cpu().float(), y.values.float()) for x, y in zip(on_cuda, on_cpu, strict=True))
        expected = scaled_matmul(*on_cpu).double()
        error = (
            scaled_matmul(on_cuda[0], replace(on_cuda[1], fast=fast)).cpu().double() - expected
        ).abs().max() / expected.abs().max()
        assert error <= 2**-7
