"""One way of bench/first_order.py in a process of its own, started by fisher_client.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from first_order_peers import PEERS
from first_order_ways import WAYS, Case, Size, Way, error, parts
from fisher_worker import Answer, Question, serve
from gpu_model import class_of_dit


def build(name: str, size: Size, only: Sequence[str]) -> Way:
    """A way on a new case; ``only`` are the parameters that are wanted, all where there are none."""
    case = Case(size)
    return (WAYS | PEERS)[name](case, only or list(case.parameters))


def reference(path: Path, size: Size) -> Answer:
    """Write what each parameter contributes by the loop over single rows in float64, and say what there is to cover."""
    case = Case(size, torch.float64)
    torch.save(parts(case), path)
    return {"elements": {name: p.numel() for name, p in case.parameters.items()}}


def check(way: Way, path: Path) -> Answer:
    """One run, which warms up too: what is covered, and the error of the scores."""
    found = way.read(way.run())
    if way.covers is None:
        return {"covered": None}
    contributions = torch.load(path, weights_only=True)
    want = sum(contributions[name] for name in way.covers)
    return {"covered": list(way.covers), "error": error(found, want)}


SMALL = {"tokens": 16, "width": 64, "tracks": 2, "queries": 2, "batch": 2}

if __name__ == "__main__":
    serve(Question(Size, SMALL, build, reference, check), class_of_dit)
