"""How fast work goes and how long it still takes; bars that show it, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from attr_engine.units import rank, workers

_open: set[Any] = set()  # bars on this process' one standard error; only programs ask for bars
_MOST_SAMPLES = 512


class Speed:
    """Speed of work over the later half of this sitting, and the time left at that speed.

    What an earlier sitting had done is where this one starts, not work of this one. The first step, which bears what is only
    done once, is left out as soon as there are two more. What is done may be the work of several processes: then the speed is
    that of all of them.

    Args:
        clock: seconds, from anywhere.
        processes: how many work; each has a first step.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, processes: int = 1) -> None:
        self._clock, self._processes = clock, processes
        self._samples: list[tuple[float, float]] = []  # (time, done), whenever more is done
        self._start, self._seen, self._dropped = 0.0, 0, 0

    def add(self, done: float) -> None:
        """Take note of how much is done; the first call says where this sitting starts."""
        now = self._clock()
        if not self._samples:
            self._start = now
        elif done <= self._samples[-1][1]:
            return
        self._samples.append((now, done))
        self._seen += 1
        begin, half = 0, (self._start + now) / 2
        while begin + 2 < len(self._samples) and self._samples[begin + 1][0] <= half:
            begin += 1
        if self._seen >= 2 * self._processes + 2:
            begin = max(begin, self._processes - self._dropped)
        del self._samples[:begin]
        self._dropped += begin
        if len(self._samples) > _MOST_SAMPLES:
            del self._samples[1:-2:2]

    @property
    def speed(self) -> float | None:
        """Units a second, now; None before this sitting has done anything."""
        if len(self._samples) < 2:
            return None
        (first, before), (last, done), latest = self._samples[0], self._samples[-1], self._samples[-2][1]
        seconds = max(last - first, 1e-9)
        # Where the next step is late, at most that one step is done by now.
        late = (2 * done - latest - before) / max(self._clock() - first, 1e-9)
        return min((done - before) / seconds, late)

    def seconds_left(self, total: float) -> float | None:
        """Seconds until ``total`` is done; None before this sitting has done anything."""
        if self._samples and self._samples[-1][1] >= total:
            return 0.0
        speed = self.speed
        if speed is None:
            return None
        (_, before), (last, done) = self._samples[-2:]
        now = min(done + speed * (self._clock() - last), 2 * done - before, total)  # at most one step more
        return (total - now) / speed


def clock_time(seconds: float | None) -> str:
    """``m:ss`` or ``h:mm:ss``; ``?`` where it is not known."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def close_all() -> None:
    """End the lines of bars that an error left unfinished, so that its message has a line of its own."""
    while _open:
        _open.pop().close()


def bar(what: str, unit: str = "it") -> Callable[[float, int], None]:
    """A callback ``(done, total)`` that draws a bar; where there is no terminal, a line every 15 s.

    The first call says where the work starts (after a resume not at 0), so that the time left is right.
    """
    shown: Any = None
    speed = Speed(processes=workers())

    def draw(done: float, total: int) -> Any:
        from tqdm import tqdm

        class Bar(tqdm):
            @property
            def format_dict(self) -> dict[str, Any]:
                left = clock_time(speed.seconds_left(total))
                return {**super().format_dict, "left": left, "whole": int(self.n)}

        interval = 0.2 if sys.stderr.isatty() else 15.0
        form = (
            f"{{desc}}: {{percentage:3.0f}}%|{{bar}}| {{whole}}/{{total}} {unit} [{{elapsed}}, {{left}} left]"
        )
        return Bar(
            total=total, desc=what, unit=unit, mininterval=interval, maxinterval=interval, initial=done, bar_format=form
        )  # fmt: skip

    def update(done: float, total: int) -> None:
        nonlocal shown
        if rank() > 0:  # one of several processes shows what all have done
            return
        speed.add(done)
        if shown is None:
            shown = draw(done, total)
            _open.add(shown)
        shown.update(done - shown.n)
        if done >= total:
            shown.close()
            _open.discard(shown)

    return update
