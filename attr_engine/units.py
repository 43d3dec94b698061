"""Work in units that several processes share: each takes what nobody else works at, and nothing is done twice.

A unit is done when its file is there. A process holds a unit by a lock on ``<unit>.lock``, which the system gives back when
the process ends, however it ends: a killed worker's unit is taken by another one, workers may come and go, and a slow one
holds nobody up until the last unit. Which process computes a unit changes none of its bits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from attr_engine.errors import UserError

_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_BETWEEN_COUNTS = 5.0
_TRIES = 10


def rank() -> int:
    """Which of the processes that ``torchrun`` started this one is; 0 where it did not."""
    return int(os.environ.get("RANK", "0"))


def workers() -> int:
    """How many processes ``torchrun`` started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def lock(file: int, path: Path, how: int) -> bool:
    """Lock an open file, by ``fcntl.flock``'s flags; returns whether it is locked now.

    Raises:
        UserError: the file system has no locks.
    """
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{path} cannot be locked ({error.strerror}): choose another --out, on a file system that has locks "
            "(NFS: version 4, or 3 with its lock daemon)"
        ) from error
    return True


@contextlib.contextmanager
def held(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file for as long as the block runs.

    Args:
        path: the file; it is made, and stays.
        wait: until another process lets go of it.

    Yields:
        Whether it is held; with ``wait`` always.

    Raises:
        UserError: the file system has no locks.
        OSError: the file cannot be made.
    """
    file = _opened(path)
    try:
        yield lock(file, path, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    finally:
        os.close(file)


def _count(paths: Sequence[Path]) -> int:
    """How many of the units are there; a listing of each folder, because there may be many."""
    there: set[Path] = set()
    for folder in {p.parent for p in paths}:
        with contextlib.suppress(FileNotFoundError):
            there.update(folder / name for name in os.listdir(folder))
    return sum(p in there for p in paths)


def _opened(path: Path) -> int:
    """A lock file, made where it is missing."""
    tries = 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except (
            FileNotFoundError,
            FileExistsError,
        ):  # whoever is done first removes the folder, perhaps just now
            tries += 1
            if tries == _TRIES:
                raise


def run_units(
    paths: Sequence[Path],
    compute: Callable[[int], None],
    finished: Path | None,
    locks: Path,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Compute every unit whose file is missing, beside other processes that do the same; return when all are there.

    Args:
        paths: the file of every unit.
        compute: makes the file of a unit, given its index; what it raises ends this process' part.
        finished: what is made of all units, if it is a file; once it is there, missing units are no longer needed.
        locks: prefix of the lock files.
        progress: called with the number of units that are done, whoever did them: before, after and while others are waited
            for. What it raises ends this process' part.
    """
    start = rank() * len(paths) // max(1, workers())
    order = [*range(start, len(paths)), *range(start)]  # neighbours do not try for the same units at first

    def over() -> bool:
        return finished is not None and finished.exists()

    while True:
        missing = [i for i in order if not paths[i].exists()]
        ended = not missing or over()
        done, looked = len(paths) - len(missing), time.monotonic()
        if progress is not None:
            progress(len(paths) if ended else done)
        if ended:
            return
        idle = True
        for i in missing:
            with held(locks.with_name(f"{locks.name}-{i}.lock")) as mine:
                if not mine:
                    continue
                idle = False
                if not paths[i].exists() and not over():
                    compute(i)
                    done += 1
            if workers() > 1 and time.monotonic() - looked > _SECONDS_BETWEEN_COUNTS:
                done, looked = _count(paths), time.monotonic()
            if progress is not None:
                progress(done)
        if idle:
            time.sleep(_SECONDS_BETWEEN_LOOKS)


@contextlib.contextmanager
def once(lock: Path, finished: Path) -> Iterator[bool]:
    """Let one process at a time into the block; the others wait, and find it done.

    Args:
        lock: lock file.
        finished: what the block makes.

    Yields:
        Whether there is something to do.
    """
    with held(lock, wait=True):
        yield not finished.exists()
