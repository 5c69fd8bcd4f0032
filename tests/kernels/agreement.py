"""Checks shared by the tests of operations: agreement with a reference in float64, reproducibility, compilation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch._dynamo
from torch import Tensor

from megasora.kernels.rope3d import Rope
from megasora.kernels.rows import Rows

TOLERANCE = {  # largest error, as a fraction of the largest value of a tensor; inputs are rounded before
    torch.float64: 1e-12,
    torch.float32: 4e-6,
    torch.float16: 2**-9,
    torch.bfloat16: 2**-6,
}

on_gpu = pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
VARIANTS = [  # backend, device, dtype
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
each_variant = pytest.mark.parametrize("backend, device, dtype", VARIANTS)
each_backend = pytest.mark.parametrize("backend", ["torch", "triton"])
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

PACKS = {  # lengths of rows, tokens of padding, width
    "uneven rows, one empty": ((40, 0, 75, 15), 0, 96),
    "one token": ((1,), 0, 40),
    "padding longer than a tile": ((33, 7), 50, 24),
    "all padding": ((0, 0), 9, 24),
    "no token": ((0, 0), 0, 24),
}


def build_rows(lengths: Sequence[int], padding: int, device: str = "cpu") -> Rows:
    """Consecutive rows of these lengths, then padding."""
    cu = torch.tensor([0, *lengths]).cumsum(0)
    return Rows.from_cu_seqlens(cu, int(cu[-1]) + padding, device)


ROPE_BASE = 10_000.0


def random_coords(num_tokens: int, largest: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(0, largest, (num_tokens, 3), generator=torch.Generator().manual_seed(seed))


def build_rope(num_tokens: int, head_dim: int, device: str = "cpu", **options: object) -> Rope:
    return Rope.build(random_coords(num_tokens), head_dim, ROPE_BASE, device=device, **options)


Operation = Callable[..., Tensor | tuple[Tensor, ...]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def for_triton(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in fp32 on the device where Triton runs."""
    return [x.float().to(TRITON_DEVICE) for x in tensors]


def outputs_and_gradients(operation: Operation, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Of `operation(*tensors)`; the gradients of its outputs are the same for every dtype and device."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = operation(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    # rounded to 8 bits, which are exact in every dtype
    grads = [normal(*y.shape, seed=100 + i).bfloat16().to(y) for i, y in enumerate(outputs)]
    return [y.detach() for y in outputs], list(torch.autograd.grad(outputs, leaves, grads))


def assert_agrees(
    operation: Operation, reference: Operation, tensors: Sequence[Tensor], device: str, dtype: torch.dtype
) -> None:
    """Outputs and gradients of `operation` in `dtype` equal those of `reference` on the same values in float64.

    NaN is a failure.
    """
    rounded = [x.detach().to(dtype) for x in tensors]
    expected = outputs_and_gradients(reference, [x.double() for x in rounded])
    actual = outputs_and_gradients(operation, [x.to(device) for x in rounded])
    for kind, actual_tensors, expected_tensors in zip(("output", "gradient"), actual, expected, strict=True):
        for i, (a, b) in enumerate(zip(actual_tensors, expected_tensors, strict=True)):
            assert a.shape == b.shape and a.dtype == dtype, f"{kind} {i}: {a.dtype} {tuple(a.shape)}"
            scale = max(1e-30, float(b.abs().max())) if b.numel() else 1.0
            error = float((a.cpu().double() - b).abs().max()) / scale if b.numel() else 0.0
            assert error <= TOLERANCE[dtype], f"error {error:.1e} of {kind} {i}"


def assert_gradients_repeat(operation: Operation, tensors: Sequence[Tensor]) -> None:
    """Gradients of two runs are equal bit by bit."""
    first, second = (outputs_and_gradients(operation, tensors)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def assert_compiles_as_one_graph(operation: Operation, tensors: Sequence[Tensor]) -> None:
    """torch.compile accepts the operation without a graph break, and the result has its outputs and gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
    actual, expected = outputs_and_gradients(compiled, tensors), outputs_and_gradients(operation, tensors)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def saved_bytes(operation: Operation, tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages that the operation saves for its backward pass."""
    nbytes = {}

    def record(x: Tensor) -> Tensor:
        nbytes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        operation(*[x.detach().requires_grad_() for x in tensors])
    return sum(nbytes.values())
