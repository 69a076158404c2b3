"""Items made in the background before they are asked for."""

import threading
import time

import pytest

from hfedmoe_jax.data import Prefetch


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


def counted(made, count=100):
    for number in range(count):
        made.append(number)
        yield number


def test_an_error_is_raised_where_its_item_was_due():
    def source():
        yield 1
        raise ValueError("no more")

    items = iter(Prefetch(source()))
    assert next(items) == 1
    with pytest.raises(ValueError, match="no more"):
        next(items)


def test_items_are_made_before_they_are_asked_for_but_only_so_many():
    made = []
    prefetch = Prefetch(counted(made), depth=3)
    wait_until(lambda: len(made) == 4)  # three that wait, and one that waits for room
    items = iter(prefetch)
    assert [next(items) for _ in range(2)] == [0, 1]
    wait_until(lambda: len(made) == 6)
    prefetch.close()


@pytest.mark.parametrize("begun", [False, True])
def test_one_that_is_left_early_lets_its_thread_end(begun):
    made = []
    before = set(threading.enumerate())
    prefetch = Prefetch(counted(made))
    (worker,) = set(threading.enumerate()) - before
    if begun:
        for _ in prefetch:
            break
    prefetch.close()
    worker.join(timeout=20)
    assert not worker.is_alive() and len(made) < 10
