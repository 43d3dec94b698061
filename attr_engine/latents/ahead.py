"""Loading ahead: a few threads, a bounded number of items, handed out in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from attr_engine.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

_BUDGET = 1 << 30


def default_workers() -> int:
    """As many as there are cores, at most 4."""
    return min(4, os.cpu_count() or 1)


def ahead(
    items: Iterable[T],
    load: Callable[[T], R],
    workers: int | None = None,
    cost: Callable[[T], int] = lambda item: 0,
    budget: int = _BUDGET,
) -> Iterator[tuple[T, R]]:
    """Load items in threads and hand them out in the order of ``items``, whatever the number of threads.

    At most ``2 * workers`` items are loaded or being loaded and not handed out; an item whose bytes would pass the
    budget is begun once those before it are handed out. An error, of ``load`` or of ``items``, is raised in its place
    in the order.

    Args:
        items: what to load; iterated over in the caller's thread, no further than the window.
        load: called in a thread.
        workers: threads; default :func:`default_workers`.
        cost: bytes that an item takes once it is loaded, estimated.
        budget: bytes that the window may take.

    Yields:
        (item, what ``load`` made of it).

    Raises:
        UserError: less than one worker.
    """
    workers = default_workers() if workers is None else workers
    if workers < 1:
        raise UserError(f"{workers} workers cannot load anything: give 1 or more")
    waiting: deque[tuple[T, int, Future[R]]] = deque()
    failure: Exception | None = None
    source, pending, held = iter(items), deque[tuple[T, int]](), 0
    with ThreadPoolExecutor(workers, "attr-ahead") as pool:
        try:
            while True:
                while len(waiting) < 2 * workers and failure is None:
                    try:
                        if not pending:
                            item = next(source)
                            pending.append((item, cost(item)))
                    except StopIteration:
                        break
                    except Exception as error:
                        failure = error
                        break
                    if waiting and held + pending[0][1] > budget:
                        break
                    item, size = pending.popleft()
                    held += size
                    waiting.append((item, size, pool.submit(load, item)))
                if not waiting:
                    break
                item, size, future = waiting.popleft()
                result = future.result()
                del future
                held -= size
                yield item, result
                del result
        finally:
            for _, _, future in waiting:
                future.cancel()
    if failure is not None:
        raise failure
