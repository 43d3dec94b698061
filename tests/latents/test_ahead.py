"""Loading ahead keeps the order, never holds more than its window, and raises an error in its place."""

import threading
import time

import pytest

from attr_engine.errors import UserError
from attr_engine.latents.ahead import ahead, default_workers


class Counted:
    """A loader that counts what was begun and not yet handed out."""

    def __init__(self, fail: int = -1) -> None:
        self.lock, self.held, self.most, self.running, self.busiest, self.begun = (
            threading.Lock(),
            0,
            0,
            0,
            0,
            [],
        )
        self.fail = fail

    def load(self, item: int) -> int:
        with self.lock:
            self.held, self.running = self.held + 1, self.running + 1
            self.most, self.busiest = max(self.most, self.held), max(self.busiest, self.running)
            self.begun.append(item)
        time.sleep(0.001 * (item * 7 % 5))  # later items may be ready first
        with self.lock:
            self.running -= 1
        if item == self.fail:
            raise UserError(f"item {item}")
        return -item

    def take(self) -> None:
        with self.lock:
            self.held -= 1


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_items_come_in_their_order_and_the_window_is_never_passed(workers):
    counted, out = Counted(), []
    for item, value in ahead(range(60), counted.load, workers):
        counted.take()
        time.sleep(0.001)  # a slow consumer: without a bound the loader would run away
        out.append((item, value))
    assert out == [(i, -i) for i in range(60)]
    assert counted.most <= 2 * workers and counted.busiest <= workers
    assert sorted(counted.begun) == list(range(60))


def test_items_are_taken_from_their_source_no_further_than_the_window():
    taken = []

    def source():
        for i in range(100):
            taken.append(i)
            yield i

    for item, _ in ahead(source(), lambda x: x, 2):
        assert len(taken) <= item + 5
    assert len(taken) == 100


@pytest.mark.parametrize("budget", [1, 10, 25, 1000])
def test_the_bytes_of_the_window_stay_in_the_budget_or_one_item_is_loaded_alone(budget):
    lock, held, most = threading.Lock(), [], []

    def load(size):
        with lock:
            held.append(size)
            most.append((len(held), sum(held)))
        return size

    sizes = [3, 10, 40, 1, 1, 1, 12, 12, 30, 2]
    for size, _ in ahead(sizes, load, 4, lambda x: x, budget):
        with lock:
            held.remove(size)
    assert all(total <= budget or count == 1 for count, total in most)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("fail", [0, 1, 13, 29])
def test_an_error_is_raised_where_its_item_would_have_come(workers, fail):
    out, counted = [], Counted(fail)
    with pytest.raises(UserError, match=f"item {fail}$"):
        for item, _ in ahead(range(30), counted.load, workers):
            counted.take()
            out.append(item)
    assert out == list(range(fail))
    assert counted.running == 0 and len(counted.begun) <= fail + 2 * workers


@pytest.mark.parametrize("workers", [1, 4])
def test_an_error_of_the_source_comes_after_the_items_before_it(workers):
    def source():
        yield from range(5)
        raise UserError("the source broke")

    out = []
    with pytest.raises(UserError, match="the source broke"):
        for item, _ in ahead(source(), lambda x: x, workers):
            out.append(item)
    assert out == list(range(5))


def test_threads_end_when_the_caller_stops_early():
    before = set(threading.enumerate())
    loaded = ahead(range(1000), Counted().load, 4)
    for item, _ in loaded:
        if item == 3:
            break
    loaded.close()
    # Threads of others may end at any moment: what counts is that none was added.
    assert not set(threading.enumerate()) - before


def test_nothing_to_load_is_nothing(monkeypatch):
    assert list(ahead([], Counted().load)) == []
    with pytest.raises(UserError, match="0 workers"):
        list(ahead([1], Counted().load, 0))
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert default_workers() == 1
    monkeypatch.setattr("os.cpu_count", lambda: 96)
    assert default_workers() == 4
