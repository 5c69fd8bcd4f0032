"""Threads that read: results in order, errors where they are used, and none left behind but one that hangs."""

import threading
import time

import pytest

from megasora.data.readers import Readers


def alive(readers: Readers) -> int:
    return sum(thread.is_alive() for thread in readers.threads)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_results_come_in_the_order_in_which_they_were_asked_for(count):
    def read(pack, begin, waiting):
        time.sleep(0.002 * (pack % 3))
        return pack**2

    readers = Readers(read, count)
    first, second, nothing = readers.ask(range(20)), readers.ask(range(20, 25)), readers.ask([])
    assert list(second()) == [n**2 for n in range(20, 25)]
    assert list(first()) == [n**2 for n in range(20)]
    assert list(nothing()) == []
    readers.close()


@pytest.mark.parametrize("count", [0, 2])
def test_an_error_is_raised_in_its_place(count):
    readers = Readers(lambda pack, begin, waiting: 1 / pack, count)
    results = readers.ask([2, 0, 4])()
    assert next(results) == 0.5
    with pytest.raises(ZeroDivisionError):
        next(results)
    readers.close()


def test_behind_join_no_thread_reads_on_not_even_the_next_clip_of_its_pack():
    began, begun, go_on = threading.Barrier(4), [], threading.Event()

    def read(pack, begin, waiting):
        for number in pack:
            begin(number)
            begun.append(number)
            if number == 0:
                with waiting:
                    began.wait(5)
                    go_on.wait(5)

    readers = Readers(read, 3)
    readers.ask([range(100)] * 50)
    began.wait(5)
    readers.close()
    assert alive(readers) == 3
    go_on.set()
    readers.join(patience=60)
    assert alive(readers) == 0 and begun == [0, 0, 0]


def test_a_read_that_hangs_is_not_waited_for_and_its_clip_is_known():
    release, hangs = threading.Event(), threading.Event()

    def read(pack, begin, waiting):
        for number in pack:
            begin(number)
            if number == 7:
                hangs.set()
                release.wait(30)

    readers = Readers(read, 2)
    readers.ask([[5, 6, 7, 8]])
    hangs.wait(5)
    readers.close()
    start = time.monotonic()
    readers.join(patience=0.1)
    assert time.monotonic() - start < 2
    assert alive(readers) == 1
    assert readers.slowest()[0] == 7
    release.set()


def test_a_pack_that_was_given_is_not_held():
    class Pack:
        there = 0

        def __init__(self):
            Pack.there += 1

        def __del__(self):
            Pack.there -= 1

    readers = Readers(lambda pack, begin, waiting: Pack(), 2)
    read = readers.ask(range(6))
    assert len(list(read())) == 6
    del read
    deadline = time.monotonic() + 5
    while Pack.there and time.monotonic() < deadline:  # a thread may just be letting go
        time.sleep(0.001)
    assert Pack.there == 0
    readers.close()
