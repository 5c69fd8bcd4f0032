"""How operators are called: directly, or through the dispatcher where somebody looks."""

from unittest import mock

import pytest
import torch
from agreement import TRITON_DEVICE, build_rows, for_triton, normal
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megasora.kernels.gated_add import forward_triton, gated_add
from megasora.kernels.launch import call, cdiv

ROWS = build_rows((4, 5), 3, TRITON_DEVICE)
INDEX = ROWS.tile_start_Q, ROWS.tile_row_Q, ROWS.first_tile_P


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def tensors():
    return for_triton([normal(12, 16), normal(12, 16, seed=1), normal(2, 16, seed=2)])


def calls_of_the_function():
    """Counts calls of the function of `forward_triton` that do not come through its operator."""
    return mock.patch.object(forward_triton, "_init_fn", wraps=forward_triton._init_fn)


def test_an_eager_call_goes_around_the_dispatcher_with_the_same_result():
    x, branch, gate = tensors()
    with calls_of_the_function() as function:
        y = call(forward_triton, x, branch, gate, *INDEX)
    assert function.call_count == 1
    assert torch.equal(y, forward_triton(x, branch, gate, *INDEX))


def test_a_dispatch_mode_sees_the_operator():
    x, branch, gate = (t.requires_grad_() for t in tensors())
    with Recorder() as recorder:
        gated_add(x, branch, gate, ROWS, backend="triton").sum().backward()
    assert {"megasora::gated_add", "megasora::gated_add_backward"} <= set(recorder.names)


@pytest.mark.parametrize("kind", ["meta", "fake", "subclass"])
def test_what_is_no_plain_tensor_goes_through_the_operator(kind):
    x, branch, gate = tensors()
    if kind == "meta":
        arguments = [t.to("meta") for t in (x, branch, gate, *INDEX)]
    elif kind == "fake":
        mode = FakeTensorMode()
        arguments = [mode.from_tensor(t) for t in (x, branch, gate, *INDEX)]
    else:
        arguments = [x.as_subclass(type("Labelled", (torch.Tensor,), {})), branch, gate, *INDEX]
    with calls_of_the_function() as function:
        y = call(forward_triton, *arguments)
    assert function.call_count == 0 and y.shape == x.shape


def test_blocks_cover_a_length():
    assert [cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
