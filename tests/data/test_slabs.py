"""Memory is used again when nobody can see it any more, and never before."""

import gc
import threading

import numpy as np
import pytest
import torch

from megasora.data.slabs import Slabs


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def test_memory_is_used_again_once_it_was_let_go():
    slabs = Slabs(1 << 16, keep=2)
    first = slabs.take()
    assert first.shape == (1 << 16,) and first.dtype == np.uint8
    here = address(first)
    assert address(slabs.take()) != here  # it is held
    del first
    assert here in {address(slabs.take()), address(slabs.take())}


VIEWS = {
    "the tensor": lambda tensor: tensor,
    "a row": lambda tensor: tensor.view(torch.float16).view(-1, 8)[3],
    "an array of it": lambda tensor: tensor.view(torch.int32).numpy()[5:7],
    "a part of its memory": lambda tensor: memoryview(tensor.numpy())[9:12],
    "what was detached": lambda tensor: tensor.detach().view(torch.bfloat16)[:1],
    "its transpose in a tuple": lambda tensor: (tensor.view(8, -1).T,),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("part", [slice(None), slice(64, 4096)], ids=["all", "part"])
def test_memory_of_which_anything_is_held_is_not_used_again(part, view):
    slabs = Slabs(1 << 13, keep=4)
    array = slabs.take()
    here = address(array)
    held = VIEWS[view](torch.from_numpy(array[part]))
    del array
    gc.collect()
    assert not slabs.idle
    assert here not in {address(slabs.take()) for _ in range(3)}
    del held
    gc.collect()
    assert here in {address(a) for a in [slabs.take() for _ in range(4)]}


def test_no_more_than_so_many_slabs_lie_idle():
    slabs = Slabs(4096, keep=3)
    held = [slabs.take() for _ in range(8)]
    assert len({address(array) for array in held}) == 8 and not slabs.idle
    held.clear()
    assert len(slabs.idle) == 3


def test_no_two_threads_hold_the_same_memory():
    slabs, wrong = Slabs(64, keep=4), []

    def work(mark: int) -> None:
        for _ in range(300):
            array = slabs.take()
            array[:] = mark
            tensor = torch.from_numpy(array)
            del array
            if not bool((tensor == mark).all()):
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(slabs.idle) <= 4
