"""The prefetcher: items in order, at most so many ahead, errors where they are used, and an end is an error."""

import itertools

import pytest

from megasora.data.prefetch import Prefetcher

TIMEOUT = 10.0  # seconds


def test_items_arrive_in_order_and_are_not_read_too_far_ahead():
    produced = []

    def items():
        for item in itertools.count():
            produced.append(item)
            yield item

    prefetcher = Prefetcher(items(), depth=2)
    assert [prefetcher.get(TIMEOUT) for _ in range(5)] == list(range(5))
    prefetcher.stop()
    prefetcher.join(TIMEOUT)
    assert not prefetcher.thread.is_alive() and len(produced) <= 5 + 2 + 1


def test_an_iterator_that_ends_is_an_error():
    prefetcher = Prefetcher(iter([1]), depth=2)
    assert prefetcher.get(TIMEOUT) == 1
    with pytest.raises(RuntimeError, match="must be endless"):
        prefetcher.get(TIMEOUT)
