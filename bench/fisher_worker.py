"""One way of bench/fisher.py in a process of its own, started by fisher_client.py; :func:`serve` is that of any question.

A line of JSON on stdin (``{"do": "build" | "check" | "run" | "peak", ...}``) is answered by one on stdout; whatever a
library prints goes to stderr.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fisher_peers import PEERS
from fisher_ways import WAYS, Case, Size, Way, dit, errors, loop
from record import watch_memory

Answer = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What a worker can be asked about a way.

    Attributes:
        size: the class of a case's size, made of the ``size`` of a question.
        small: a size for a first run, which imports all there is to import; it gets the depth of the case.
        build: makes a way, of its name, a size and the parameters that are wanted: all where there are none.
        reference: writes what ways are compared with; says what there is to cover.
        check: runs a way and compares it.
    """

    size: Callable[..., Any]
    small: dict[str, int]
    build: Callable[[str, Any, Sequence[str]], Any]
    reference: Callable[[Path, Any], Answer]
    check: Callable[[Any, Path], Answer]


def build(name: str, size: Size, only: Sequence[str]) -> Way:
    """A way on a new case; ``only`` are the parameters that are wanted, all where there are none."""
    case = Case(size)
    return (WAYS | PEERS)[name](case, only or list(case.parameters))


def reference(path: Path, size: Size) -> Answer:
    """Write the sums of the loop over single rows in float64, and say what there is to cover."""
    case = Case(size, torch.float64)
    torch.save(loop(case, list(case.parameters)).run(), path)
    return {"elements": {name: p.numel() for name, p in case.parameters.items()}}


def check(way: Way, path: Path) -> Answer:
    """One run, which warms up too: the error of every parameter that is covered."""
    result = way.run()
    if way.read is None:
        return {"errors": None}
    return {"errors": errors(way.read(result), torch.load(path, weights_only=True))}


def run(way: Any, times: int) -> Answer:
    """Seconds of one run, the mean of some."""
    gc.collect()
    # What stays is not looked at again: an Analyzer of kronfluence collects garbage twice a run, which would cost it
    # a third of a second for the objects of torch alone.
    gc.freeze()
    seconds = 0.0
    for _ in range(times):
        start = time.perf_counter()
        result = way.run()
        seconds += time.perf_counter() - start
        del result
    return {"seconds": seconds / times}


def peak(question: Question, name: str, size: Any, only: Sequence[str]) -> Answer:
    """What the process grows by in one run, over what it holds when the model, the rows and the way are ready."""
    # A run at a small size first: what is imported or set up at first use is not the way's memory.
    small = question.build(name, question.size(**question.small, depth=size.depth), only)
    small.run()
    del small
    way = question.build(name, size, only)
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and not given back would hide growth
    highest, how = watch_memory()
    result = way.run()
    grown = highest()
    del result
    return {"peak_mb": grown / 1e6, "how": how}


def serve(asked: Question, first: Callable[[], object]) -> None:
    """Answer questions about one way until stdin ends; ``first`` imports what takes seconds, in which other processes start too."""
    name, threads, folder = sys.argv[1:]
    torch.set_num_threads(int(threads))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.suppress(ImportError):  # said again when a case is built
        first()
    way = None
    for line in sys.stdin:
        question = json.loads(line)
        size = asked.size(**question["size"])
        only = question["only"]
        path = Path(folder) / f"reference-{size.tokens}.pt"
        try:
            if name == "reference":
                answer = asked.reference(path, size)
            elif question["do"] == "peak":
                answer = peak(asked, name, size, only)
            elif question["do"] == "check":
                way = None  # the case before goes first, and what was frozen of it
                gc.unfreeze()
                gc.collect()
                way = asked.build(name, size, only)
                answer = asked.check(way, path)
            else:
                assert way is not None
                answer = run(way, question["times"])
        except Exception as error:  # whatever a library raises is its result
            status = "missing" if isinstance(error, ImportError) else "failed"
            answer = {status: f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(Question(Size, {"tokens": 16, "width": 64, "batch": 2}, build, reference, check), dit)
