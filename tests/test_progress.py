"""The time left: of this sitting's speed, without its first step, of all processes, and never stuck."""

import numpy as np
import pytest

from attr_engine.progress import _MOST_SAMPLES, Speed, clock_time


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def feed(steps, processes=1, before=0.0):
    """A speed that was told of steps of (seconds, units), and its clock."""
    clock = Clock()
    clock.now = 1234.5
    speed, done = Speed(clock, processes), before
    speed.add(done)
    for seconds, units in steps:
        clock.now += seconds
        done += units
        speed.add(done)
    return speed, clock, done


def slow_obvious(steps, processes):
    """Units a second from all samples: from the last one in the first half of the time, or after the first steps."""
    times = np.concatenate([[0.0], np.cumsum([s for s, _ in steps])])
    done = np.concatenate([[0.0], np.cumsum([u for _, u in steps])])
    n = len(times)
    begin = max(i for i in range(n - 1) if i == 0 or times[i] <= times[-1] / 2)
    if n >= 2 * processes + 2:
        begin = max(begin, processes)
    return (done[-1] - done[begin]) / (times[-1] - times[begin])


def test_nothing_is_known_before_anything_is_done():
    speed, _, _ = feed([])
    assert speed.seconds_left(10) is None
    speed, _, _ = feed([], before=10)
    assert speed.seconds_left(10) == 0.0


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_the_speed_is_that_of_the_later_half(processes, rng):
    steps = []
    for _ in range(60):
        steps.append((rng.uniform(0.01, 3), rng.integers(1, 4)))
        speed, _, done = feed(steps, processes)
        expected = slow_obvious(steps, processes)
        assert speed.speed == pytest.approx(expected, rel=1e-9)
        assert speed.seconds_left(done + 7) == pytest.approx(7 / expected, rel=1e-9)


def test_what_an_earlier_sitting_did_is_not_speed_of_this_one(rng):
    steps = [(rng.uniform(0.1, 2), 1) for _ in range(9)]
    fresh, _, done = feed(steps)
    resumed, _, _ = feed(steps, before=5000)
    assert resumed.seconds_left(5100) == pytest.approx(fresh.seconds_left(100), rel=1e-9)


def test_a_slow_first_step_is_left_out():
    speed, _, done = feed([(60, 1), (1, 1), (1, 1)])
    assert speed.seconds_left(done + 10) == pytest.approx(10)
    burst = [(60, 1), (0.01, 1), (10, 1), (0.01, 1), (10, 1)]  # two processes
    speed, _, done = feed(burst, processes=2)
    assert speed.seconds_left(done + 10) == pytest.approx(10 / (3 / 20.01), rel=1e-6)


def test_time_that_passes_counts_and_a_stalled_step_makes_it_longer(rng):
    speed, clock, done = feed([(2, 1)] * 10)
    clock.now += 1
    assert speed.seconds_left(done + 5) == pytest.approx(9)
    left = []
    for _ in range(50):
        clock.now += 10
        left.append(speed.seconds_left(done + 5))
    assert left == sorted(left) and left[-1] > left[0] > 0


def test_many_steps_are_not_kept(rng):
    steps = [(0.5, 1)] * 5000
    speed, _, done = feed(steps)
    assert len(speed._samples) <= _MOST_SAMPLES
    assert speed.seconds_left(done + 100) == pytest.approx(50)


def test_times_are_written_as_clocks_do():
    assert [clock_time(s) for s in (None, 0, 59.6, 61, 3600, 90061)] == [
        "?", "0:00", "1:00", "1:01", "1:00:00", "25:01:01",
    ]  # fmt: skip
