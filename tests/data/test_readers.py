"""Threads that read: results in order, errors where they are used, and none left behind but one that hangs."""

import threading
import time

import pytest

from megasora.data.readers import Readers


def alive(readers: Readers) -> int:
    return sum(thread.is_alive() for thread in readers.threads)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_results_come_in_the_order_in_which_they_were_asked_for(count):
    def read(number):
        time.sleep(0.002 * (number % 3))
        return number**2

    readers = Readers(read, count)
    first, second = readers.ask(range(20)), readers.ask(range(20, 25))
    assert list(second()) == [n**2 for n in range(20, 25)]
    assert list(first()) == [n**2 for n in range(20)]
    readers.close()


def test_an_error_is_raised_in_its_place():
    readers = Readers(lambda number: 1 / number, 2)
    results = readers.ask([2, 0, 4])()
    assert next(results) == 0.5
    with pytest.raises(ZeroDivisionError):
        next(results)
    readers.close()


def test_behind_join_no_thread_reads_on():
    began = threading.Event()

    def read(number):
        began.set()
        time.sleep(0.3)

    readers = Readers(read, 3)
    readers.ask(range(100))
    began.wait(5)
    readers.close()
    assert alive(readers) > 0
    readers.join(patience=60)
    assert alive(readers) == 0


def test_a_read_that_hangs_is_not_waited_for():
    release = threading.Event()
    readers = Readers(lambda number: release.wait(30), 2)
    readers.ask([7])
    while readers.slowest() is None:
        time.sleep(0.01)
    readers.close()
    start = time.monotonic()
    readers.join(patience=0.1)
    assert time.monotonic() - start < 2
    assert alive(readers) == 1
    assert readers.slowest()[0] == 7
    release.set()
