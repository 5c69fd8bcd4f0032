"""A buffer is reused once nothing refers to it any more, and never before."""

import gc
import threading

import numpy as np
import pytest
import torch

from megasora.data.buffer_pool import BufferPool


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def test_a_buffer_is_reused_once_it_is_freed():
    pool = BufferPool(1 << 16, max_idle=2)
    array = pool.acquire()
    assert array.shape == (1 << 16,) and array.dtype == np.uint8
    first = address(array)
    assert address(pool.acquire()) != first  # still referenced
    del array
    assert first in {address(pool.acquire()), address(pool.acquire())}


VIEWS = {
    "the tensor": lambda tensor: tensor,
    "a row": lambda tensor: tensor.view(torch.float16).view(-1, 8)[3],
    "a numpy view": lambda tensor: tensor.view(torch.int32).numpy()[5:7],
    "a memoryview": lambda tensor: memoryview(tensor.numpy())[9:12],
    "a detached view": lambda tensor: tensor.detach().view(torch.bfloat16)[:1],
    "its transpose in a tuple": lambda tensor: (tensor.view(8, -1).T,),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("part", [slice(None), slice(64, 4096)], ids=["all", "part"])
def test_a_buffer_with_any_live_view_is_not_reused(part, view):
    pool = BufferPool(1 << 13, max_idle=4)
    array = pool.acquire()
    first = address(array)
    live = VIEWS[view](torch.from_numpy(array[part]))
    del array
    gc.collect()
    assert not pool.idle
    assert first not in {address(pool.acquire()) for _ in range(3)}
    del live
    gc.collect()
    assert first in {address(a) for a in [pool.acquire() for _ in range(4)]}


def test_at_most_max_idle_buffers_are_kept():
    pool = BufferPool(4096, max_idle=3)
    arrays = [pool.acquire() for _ in range(8)]
    assert len({address(array) for array in arrays}) == 8 and not pool.idle
    arrays.clear()
    assert len(pool.idle) == 3


def test_no_two_threads_get_the_same_buffer():
    pool, wrong = BufferPool(64, max_idle=4), []

    def work(mark: int) -> None:
        for _ in range(300):
            array = pool.acquire()
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
    assert not wrong and len(pool.idle) <= 4
