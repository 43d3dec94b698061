"""Progress bars with time left, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable


def bar(what: str, unit: str = "it") -> Callable[[int, int], None]:
    """A callback ``(done, total)`` that draws a bar; where there is no terminal, a line every 15 s."""
    from tqdm import tqdm

    shown: tqdm[None] | None = None

    def update(done: int, total: int) -> None:
        nonlocal shown
        if shown is None:
            interval = 0.2 if sys.stderr.isatty() else 15.0
            shown = tqdm(
                total=total,
                desc=what,
                unit=unit,
                mininterval=interval,
                maxinterval=interval,
                initial=max(0, done - 1),
                leave=True,
            )
        shown.update(done - shown.n)
        if done >= total:
            shown.close()

    return update
