"""Reader threads: results in order, errors where they are used, no thread left running except one that hangs."""

import threading
import time

import pytest

from megasora.data.reader_lock import ReaderLock
from megasora.data.reader_pool import ReaderPool


def num_alive(readers: ReaderPool) -> int:
    return sum(thread.is_alive() for thread in readers.threads)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_results_come_in_the_order_of_submission(count):
    def read(pack, begin):
        time.sleep(0.002 * (pack % 3))
        return pack**2

    readers = ReaderPool(read, count, ReaderLock())
    first, second, empty = readers.submit(range(20)), readers.submit(range(20, 25)), readers.submit([])
    assert list(second()) == [n**2 for n in range(20, 25)]
    assert list(first()) == [n**2 for n in range(20)]
    assert list(empty()) == []
    readers.close()


@pytest.mark.parametrize("count", [0, 2])
def test_an_error_is_raised_at_its_place_in_the_results(count):
    readers = ReaderPool(lambda pack, begin: 1 / pack, count, ReaderLock())
    results = readers.submit([2, 0, 4])()
    assert next(results) == 0.5
    with pytest.raises(ZeroDivisionError):
        next(results)
    readers.close()


def test_after_join_no_thread_reads_even_the_next_clip_of_its_pack():
    started, begun, resume, reader_lock = threading.Barrier(4), [], threading.Event(), ReaderLock()

    def read(pack, begin):
        for clip in pack:
            begin(clip)
            begun.append(clip)
            if clip == 0:
                with reader_lock.released():
                    started.wait(5)
                    resume.wait(5)

    readers = ReaderPool(read, 3, reader_lock)
    readers.submit([range(100)] * 50)
    started.wait(5)
    readers.close()
    assert num_alive(readers) == 3
    resume.set()
    readers.join(timeout=60)
    assert num_alive(readers) == 0 and begun == [0, 0, 0]


def test_join_does_not_wait_for_a_read_that_hangs_and_its_clip_is_known():
    release, hangs = threading.Event(), threading.Event()

    def read(pack, begin):
        for clip in pack:
            begin(clip)
            if clip == 7:
                hangs.set()
                release.wait(30)

    readers = ReaderPool(read, 2, ReaderLock())
    readers.submit([[5, 6, 7, 8]])
    hangs.wait(5)
    readers.close()
    start = time.monotonic()
    readers.join(timeout=0.1)
    assert time.monotonic() - start < 2
    assert num_alive(readers) == 1
    assert readers.is_hung(0.1) and readers.longest_running()[0] == 7
    release.set()


def test_the_pool_does_not_keep_the_packs_that_it_returned():
    class Pack:
        alive = 0

        def __init__(self):
            Pack.alive += 1

        def __del__(self):
            Pack.alive -= 1

    readers = ReaderPool(lambda pack, begin: Pack(), 2, ReaderLock())
    results = readers.submit(range(6))
    assert len(list(results())) == 6
    del results
    deadline = time.monotonic() + 5
    while Pack.alive and time.monotonic() < deadline:  # a thread may be about to drop its reference
        time.sleep(0.001)
    assert Pack.alive == 0
    readers.close()


def test_a_released_reader_lock_is_taken_again_even_after_an_error():
    reader_lock = ReaderLock()
    with reader_lock:
        with pytest.raises(OSError, match="disk"), reader_lock.released():
            assert not reader_lock.lock.locked()
            raise OSError("disk")
        assert reader_lock.lock.locked()
    assert not reader_lock.lock.locked()


def test_a_thread_that_does_not_hold_the_reader_lock_cannot_release_it():
    reader_lock, locked = ReaderLock(), []

    def read_without_lock() -> None:
        with reader_lock.released():
            locked.append(reader_lock.lock.locked())

    with reader_lock:
        thread = threading.Thread(target=read_without_lock)
        thread.start()
        thread.join(5)
    assert locked == [True]
