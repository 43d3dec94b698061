"""Progress bars with time left, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tqdm import tqdm

from attr_engine.units import rank

_open: set[tqdm[None]] = set()


def close_all() -> None:
    """End the lines of bars that an error left unfinished, so that its message has a line of its own."""
    while _open:
        _open.pop().close()


def bar(what: str, unit: str = "it") -> Callable[[int, int], None]:
    """A callback ``(done, total)`` that draws a bar; where there is no terminal, a line every 15 s.

    The first call says where the work starts (after a resume not at 0), so that the time left is right.
    """
    shown: tqdm[None] | None = None

    def update(done: int, total: int) -> None:
        nonlocal shown
        if rank() > 0:  # one of several processes shows what all have done
            return
        if shown is None:
            interval = 0.2 if sys.stderr.isatty() else 15.0
            shown = tqdm(
                total=total, desc=what, unit=unit, mininterval=interval, maxinterval=interval, initial=done
            )
            _open.add(shown)
        shown.update(done - shown.n)
        if done >= total:
            shown.close()
            _open.discard(shown)

    return update
