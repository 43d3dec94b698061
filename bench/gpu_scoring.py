"""Scores of a batch of tracks with the large model: one forward pass a query, or all of them to first order."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from gpu_tools import Bench, Row, alternate, out_of_memory, peak, release
from gpu_work import MOST_ROWS, PLAN, Work, fitting, work_of
from torch import Tensor

from attr_engine.diffusion import Noised
from attr_engine.effects import measure_effects
from attr_engine.influence import row_dots
from attr_engine.updates import Update

QUERIES = (1, 4, 16)


def scoring(bench: Bench) -> dict[str, Any]:
    """A batch of tracks under 1, 4 and 16 updates: forward passes, and to first order in one backward pass."""
    work = work_of(bench)
    work.fisher = {}
    release(bench.device)
    out = {"forward": _by_forward(bench, work)}
    release(bench.device)
    if not bench.green("K3", "bfloat16") or not bench.green("first order", "float32"):
        bench.skip("first order", "K3 or the inner products of a small model are not known to be right")
        return {**out, "first_order": []}
    return {**out, "first_order": _by_first_order(bench, work)}


def _by_forward(bench: Bench, work: Work) -> list[Row]:
    """``measure_effects``. The updates are on the device and share their memory: reading them is not counted."""
    draws = PLAN.replicates
    delta = {n: torch.randn_like(p, dtype=torch.float32).mul_(1e-2 * p.detach().float().std())
             for n, p in work.parameters.items()}  # fmt: skip
    update = Update("q", 1e-2, "size", delta, 1.0, 1e-2)
    found = []
    tracks = work.model.batch(MOST_ROWS, bench.seed)
    for queries in QUERIES:
        if bench.budget.left() < 0:
            bench.skip(f"{queries} queries by forward passes", "the time of this part is over")
            continue

        def call(rows: int, queries: int = queries) -> None:
            measure_effects(work.model, tracks, [lambda: update] * queries, PLAN, draws, rows=rows)

        rows, needed = fitting(bench, work.rows, lambda n: peak(partial(call, n), bench.device))
        took = alternate({"call": partial(call, rows)}, bench, 3, bench.budget.left() / 5, False, least=1)
        pairs = MOST_ROWS * draws
        row = work.row(took["call"], pairs, (1 + queries) * work.size.forward_flops(), needed)
        found.append(
            {**row, "queries": queries, "rows": rows, "pairs": pairs, **_a_query(row, pairs, queries)}
        )
    return found


def _by_first_order(bench: Bench, work: Work) -> list[Row]:
    """Inner products with K bfloat16 directions, all of them in the device's memory."""
    found: list[Row] = []
    directions: dict[str, Tensor] = {}
    for most in sorted(QUERIES, reverse=True):
        try:
            directions = {n: torch.randn(most, *p.shape, device=p.device, dtype=p.dtype)
                          for n, p in work.parameters.items()}  # fmt: skip
            work.make(1)
            break
        except torch.OutOfMemoryError:
            directions = {}
        release(bench.device)
    held = len(next(iter(directions.values()))) if directions else 0
    for queries in QUERIES:
        if queries > held or bench.budget.left() < 0:
            reason = "no memory for the directions" if queries > held else "the time of this part is over"
            bench.skip(f"{queries} queries to first order", reason)
            continue
        some = {n: d[:queries] for n, d in directions.items()}

        def call(noised: Noised, some: Mapping[str, Tensor] = some) -> None:
            row_dots(work.model, work.parameters, noised, some)

        try:
            rows, needed = fitting(
                bench, work.rows, lambda n: peak(partial(call, work.make(n)), bench.device)
            )
        except Exception as error:
            if not out_of_memory(error):
                raise
            bench.skip(f"{queries} queries to first order", "no memory beside the directions")
            continue
        took = alternate({"call": partial(call, work.make(rows))}, bench, 5, bench.budget.left() / 5, False)
        row = work.row(took["call"], rows, work.size.flops()["forward + backward"], needed)
        found.append({**row, "queries": queries, "pairs": rows, **_a_query(row, rows, queries)})
    return found


def _a_query(row: Row, pairs: int, queries: int) -> Row:
    return {"seconds_a_row_and_query": row["median"] / pairs / queries}
