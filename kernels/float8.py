"""FP8 matrix products: the operands are rounded to 8 bits, each row of an operand or all of it with a scale of its own,
and the sums are in fp32 (arXiv 2209.05433; torchao's `tensorwise` and `rowwise`, with dynamic scales).

    scale = the smallest power of two with max |x| <= scale * (largest number of the format)
    values = x / scale, rounded to the nearest number of the format;  x is about scale * values
    (A B)[i, j] = scale_A[i] scale_B[j] sum_k values_A[i, k] values_B[k, j]

Formats: e4m3 has 3 bits of mantissa and numbers up to 448, e5m2 2 bits and numbers up to 57,344. A scale is a power of
two, so dividing by it is exact and an element is rounded once: by at most 2^-4 (e4m3) or 2^-3 (e5m2) of itself or, if
it is small, 2^-10 (2^-17) of `scale`. Nothing saturates. If an element is not finite, `scale` is inf: no product of its
row is finite.

On GPUs the product is torch._scaled_mm; elsewhere, the same values are multiplied in fp32 (float64 for float64).

Least traffic of `quantize` in bf16, bytes per element: 3 (2 read, 1 written) with a scale per row, if a program can
hold the row and no rank has a part of it; else 5, of which 2 for the maximum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megasora.kernels.launch import LaunchConfig, LaunchTable, call, cdiv, launch_config, resolve_backend

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
EXPONENTS = {E4M3: 8, E5M2: 15}  # the largest number of a format is 1.75 * 2^exponent
MULTIPLE = 16  # of the dims of a product's operands, see torch._scaled_mm

ROWS: LaunchTable = {"any": LaunchConfig(tile_elements=4096, elements_per_thread=32)}
MAX_ROW = 1 << 14  # elements of a row that a program holds

MAX_MANTISSA = tl.constexpr(0x600000)  # the bits of 1.75 behind the point, in fp32
INF_BITS = tl.constexpr(0x7F800000)

AllReduceMax = Callable[[Tensor], Tensor]  # the maximum over the ranks that share what is scaled; same shape


def identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Quantized:
    """A matrix `scale * values`. `scale` is fp32, [M, 1], [1, N] or [1, 1]; `dtype` that of what was quantized."""

    values: Tensor
    scale: Tensor
    dtype: torch.dtype
    fast: bool = False  # of a right operand: Hopper may add up with less than fp32, in less time

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> Quantized:
        scale = self.scale if len(self.scale) == 1 else self.scale[rows]
        return replace(self, values=self.values[rows], scale=scale)

    def t(self) -> Quantized:
        return replace(self, values=self.values.t(), scale=self.scale.t())

    def contiguous(self) -> Quantized:
        return replace(self, values=self.values.contiguous())

    def dequantize(self) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)
        return (self.values.to(wide) * self.scale).to(self.dtype)


def quantize_reference(x_MN: Tensor, dtype: torch.dtype, per_row: bool) -> Quantized:
    """Reference implementation, in float64 until the last rounding."""
    x = x_MN.double()
    largest = x.abs().amax(1, keepdim=True) if per_row else x.abs().amax().view(1, 1)
    limit = torch.finfo(dtype).max
    exponent = (largest / limit).clamp(min=2.0**-126).log2().ceil()
    exponent += (largest > limit * 2.0**exponent).double() - (largest <= limit * 2.0 ** (exponent - 1)).double()
    scale = torch.where(largest.isfinite(), 2.0 ** exponent.clamp(min=-126), torch.inf)
    return Quantized((x / scale).to(dtype), scale.float(), x_MN.dtype)


def power_of_2_scale(amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(scale, 1 / scale) of elements up to `amax`, exact powers of two in fp32; (inf, 0) if that is not finite."""
    bits = amax.float().view(torch.int32)
    exponent = (bits >> 23) - EXPONENTS[dtype] + ((bits & 0x7FFFFF) > 0x600000).int()  # biased by 127
    exponent = exponent.clamp(1, 253)  # of the scale and its inverse: both normal numbers
    is_finite = bits < 0x7F800000
    scale = torch.where(is_finite, exponent << 23, 0x7F800000).view(torch.float32)
    inverse = torch.where(is_finite, (254 - exponent) << 23, 0).view(torch.float32)
    return scale, inverse


def cast_torch(x_MN: Tensor, amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale, inverse = power_of_2_scale(amax, dtype)
    wide = torch.promote_types(x_MN.dtype, torch.float32)
    return (x_MN.to(wide) * inverse).to(dtype, memory_format=torch.contiguous_format), scale


@triton.jit
def scale_and_inverse(amax, EXPONENT: tl.constexpr):
    """`power_of_2_scale`."""
    bits = amax.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - EXPONENT + ((bits & 0x7FFFFF) > MAX_MANTISSA).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    is_finite = bits < INF_BITS
    scale = tl.where(is_finite, exponent << 23, INF_BITS).to(tl.float32, bitcast=True)
    return scale, tl.where(is_finite, (254 - exponent) << 23, 0).to(tl.float32, bitcast=True)


@triton.jit
def rows_kernel(
    x_MN, values_MN, scale_M, x_stride, M, N, EXPONENT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Scales and values of rows that a program holds: each element is read once."""
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    n = tl.arange(0, BLOCK)[None, :]
    inside = (m < M) & (n < N)
    x = tl.load(x_MN + m * x_stride + n, mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1, keep_dims=True)  # inf in place of NaN
    scale, inverse = scale_and_inverse(amax, EXPONENT)
    tl.store(scale_M + m, scale, mask=m < M)
    tl.store(values_MN + m * N + n, (x * inverse).to(values_MN.dtype.element_ty), mask=inside)


@triton.jit
def cast_kernel(
    x_MN, amax, values_MN, scale, x_stride_m, x_stride_n, M, N,
    PER_ROW: tl.constexpr, EXPONENT: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Programs are tiles; those of the first column write the scales."""
    m = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)[:, None]
    n = tl.program_id(1).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)[None, :]
    at, known = (m, m < M) if PER_ROW else (m * 0, m == 0)
    scales, inverse = scale_and_inverse(tl.load(amax + at, mask=at < M, other=0.0), EXPONENT)
    if tl.program_id(1) == 0:
        tl.store(scale + at, scales, mask=known)
    inside = (m < M) & (n < N)
    x = tl.load(x_MN + m * x_stride_m + n * x_stride_n, mask=inside, other=0.0).to(tl.float32)
    tl.store(values_MN + m * N + n, (x * inverse).to(values_MN.dtype.element_ty), mask=inside)


@torch.library.custom_op("megasora::float8_rows", mutates_args=())
def rows_triton(x_MN: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    (rows, columns), config = x_MN.shape, launch_config(ROWS, x_MN.device)
    values_MN = x_MN.new_empty(rows, columns, dtype=dtype)
    scale = x_MN.new_empty(rows, 1, dtype=torch.float32)
    block = triton.next_power_of_2(columns)
    per_program = config.vectors_per_tile(block)
    if rows * columns:
        rows_kernel[cdiv(rows, per_program),](
            x_MN, values_MN, scale, x_MN.stride(0), rows, columns, EXPONENT=EXPONENTS[dtype], ROWS=per_program,
            BLOCK=block, num_warps=config.num_warps(block),
        )  # fmt: skip
    return values_MN, scale


@rows_triton.register_fake
def _(x_MN, dtype):
    return x_MN.new_empty(x_MN.shape, dtype=dtype), x_MN.new_empty(len(x_MN), 1, dtype=torch.float32)


@torch.library.custom_op("megasora::float8_cast", mutates_args=())
def cast_triton(x_MN: Tensor, amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    (rows, columns), scale = x_MN.shape, torch.empty_like(amax)
    values_MN = x_MN.new_empty(rows, columns, dtype=dtype)
    tile = (32, 128) if x_MN.stride(1) == 1 else (64, 64)  # transposed: runs of 64 elements both ways
    grid = cdiv(rows, tile[0]), cdiv(columns, tile[1])
    if rows * columns:
        cast_kernel[grid](
            x_MN, amax, values_MN, scale, *x_MN.stride(), rows, columns,
            PER_ROW=len(amax) > 1, EXPONENT=EXPONENTS[dtype], TILE_M=tile[0], TILE_N=tile[1],
        )  # fmt: skip
    return values_MN, scale


@cast_triton.register_fake
def _(x_MN, amax, dtype):
    return x_MN.new_empty(x_MN.shape, dtype=dtype), torch.empty_like(amax)


def quantize(
    x_MN: Tensor,
    dtype: torch.dtype,
    per_row: bool,
    all_reduce_max: AllReduceMax = identity,
    backend: str = "auto",
) -> Quantized:
    """x [M, N], of any strides, in FP8: values [M, N], contiguous, and a scale of each row [M, 1], or of all [1, 1].

    dtype           E4M3 | E5M2
    all_reduce_max  of the largest magnitudes, fp32 [M, 1] or [1, 1], where ranks share the rows or the matrix
    backend         see launch.py
    """
    backend = resolve_backend(backend, x_MN)
    is_in_one_pass = per_row and all_reduce_max is identity and x_MN.stride(1) == 1 and x_MN.shape[1] <= MAX_ROW
    if backend == "triton" and is_in_one_pass:
        return Quantized(*call(rows_triton, x_MN, dtype), x_MN.dtype)
    amax = torch.linalg.vector_norm(x_MN, torch.inf, dim=1 if per_row else (0, 1), keepdim=True).float()
    amax = all_reduce_max(amax.nan_to_num(nan=torch.inf, posinf=torch.inf))  # a maximum over ranks need not keep NaN
    if backend == "triton":
        values, scale = call(cast_triton, x_MN, amax, dtype)
    else:
        values, scale = cast_torch(x_MN, amax, dtype)
    return Quantized(values, scale, x_MN.dtype)


def scaled_matmul(a_MK: Quantized, b_KN: Quantized, bias_N: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """a b + bias, [M, N] in the dtype of what `a` was made of, written to `out` if given.

    Rows of `a` and columns of `b` may have scales. On GPUs `a.values` and `b.values.t()` are contiguous, as
    `quantize` makes them, N is a multiple of 16, and K is padded to one.
    """
    if a_MK.device.type in ("cuda", "meta"):
        pad = -a_MK.shape[1] % MULTIPLE
        a, b_t = (pad_columns(q, pad) if pad else q for q in (a_MK.values, b_KN.values.t()))
        scales = a_MK.scale.contiguous(), b_KN.scale.contiguous()
        into = {} if out is None else {"out": out}
        if len(a) == 0:
            return a.new_empty(0, len(b_t), dtype=a_MK.dtype) if out is None else out
        return torch._scaled_mm(
            a, b_t.t(), *scales, bias_N, out_dtype=a_MK.dtype, use_fast_accum=b_KN.fast, **into
        )  # fmt: skip
    wide = torch.promote_types(a_MK.dtype, torch.float32)
    y = (a_MK.values.to(wide) @ b_KN.values.to(wide)) * a_MK.scale * b_KN.scale
    y = (y if bias_N is None else y + bias_N).to(a_MK.dtype)
    return y if out is None else out.copy_(y)


def pad_columns(values: Tensor, pad: int) -> Tensor:
    return F.pad(values.view(torch.uint8), (0, pad)).view(values.dtype)


def why_not(device: torch.device, per_row: bool) -> str | None:
    """Why a GPU has no FP8 products, or None. Other devices emulate them."""
    if device.type != "cuda":
        return None
    if torch.version.cuda is None:
        return "PyTorch is not built for CUDA, and other GPUs have other FP8 formats"
    capability, needed = torch.cuda.get_device_capability(device), (9, 0) if per_row else (8, 9)
    if capability >= needed:
        return None
    return (
        f"this GPU has compute capability {capability[0]}.{capability[1]}, and FP8 products with a scale per "
        f"{'row' if per_row else 'tensor'} need {needed[0]}.{needed[1]}"
    )
