"""What an operation must agree with: its reference in float64, forward and every gradient, on every way there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from megasora.kernels.rows import Rows

TOLERANCE = {  # largest difference, as a part of the largest number of a tensor; inputs are rounded before
    torch.float64: 1e-12,
    torch.float32: 4e-6,
    torch.float16: 2**-9,
    torch.bfloat16: 2**-6,
}

on_gpu = pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WAYS = [  # via, device, dtype
    pytest.param("torch", "cpu", torch.float64, id="torch-float64"),
    pytest.param("torch", "cpu", torch.float32, id="torch-float32"),
    pytest.param("torch", "cpu", torch.bfloat16, id="torch-bfloat16"),
    pytest.param(
        "triton",
        "cpu",
        torch.float32,
        id="interpreter",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here"),
    ),
    pytest.param("triton", "cuda", torch.float32, id="gpu-float32", marks=on_gpu),
    pytest.param("triton", "cuda", torch.float16, id="gpu-float16", marks=on_gpu),
    pytest.param("triton", "cuda", torch.bfloat16, id="gpu-bfloat16", marks=on_gpu),
]
every_way = pytest.mark.parametrize("via, device, dtype", WAYS)
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

PACKS = {  # of tokens in rows: lengths of the rows, tokens of padding, width
    "uneven rows, one empty": ((40, 0, 75, 15), 0, 96),
    "one token": ((1,), 0, 40),
    "padding longer than a run": ((33, 7), 50, 24),
    "all padding": ((0, 0), 9, 24),
    "no token": ((0, 0), 0, 24),
}


def rows_of(lengths: Sequence[int], padding: int, device: str = "cpu") -> Rows:
    """Rows of these lengths, one behind the other, then padding."""
    cu = torch.tensor([0, *lengths]).cumsum(0)
    return Rows.from_cu_seqlens(cu, int(cu[-1]) + padding, device)


Operation = Callable[..., Tensor | tuple[Tensor, ...]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs_and_gradients(operation: Operation, tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Of `operation(*tensors)`, with gradients of its outputs that are the same for every dtype and device."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = operation(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    # rounded to 8 bits, which every dtype holds
    grads = [normal(*y.shape, seed=100 + i).bfloat16().to(y) for i, y in enumerate(outputs)]
    return [y.detach() for y in outputs], list(torch.autograd.grad(outputs, leaves, grads))


def assert_agrees(
    operation: Operation, reference: Operation, tensors: list[Tensor], device: str, dtype: torch.dtype
) -> None:
    """`operation` of `tensors` in `dtype` against `reference` of the same numbers in float64; NaN is no agreement."""
    rounded = [x.detach().to(dtype) for x in tensors]
    expected = outputs_and_gradients(reference, [x.double() for x in rounded])
    found = outputs_and_gradients(operation, [x.to(device) for x in rounded])
    for what, ours, theirs in zip(("output", "gradient"), found, expected, strict=True):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert a.shape == b.shape and a.dtype == dtype, f"{what} {i}: {a.dtype} {tuple(a.shape)}"
            scale = max(1e-30, float(b.abs().max())) if b.numel() else 1.0
            error = float((a.cpu().double() - b).abs().max()) / scale if b.numel() else 0.0
            assert error <= TOLERANCE[dtype], f"{what} {i} is {error:.1e} off"


def bytes_kept(operation: Operation, tensors: list[Tensor]) -> dict[int, int]:
    """Storage to its bytes, of all that is kept for the backward pass."""
    kept = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        operation(*[x.detach().requires_grad_() for x in tensors])
    return kept
