"""What does a step of unlearning cost, next to plain passes of the same rows and to the loop over single draws?

    python bench/unlearn.py                 64, 512 and 2048 frames at width 512: about ten minutes
    python bench/unlearn.py --quick         one small case: does it run?

The step is ``unlearn_query``: the mean gradient of the query over its draws, divided by Fisher and damping, scaled. The loop does
the same one draw at a time by autograd alone; in float64 it is what both are compared with.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from functools import partial

import limits
import record
import torch
from cases import PLAN, Case, arguments
from torch import Tensor

from attr_engine.diffusion import losses, noised_rows
from attr_engine.fisher import Fisher
from attr_engine.unlearn import unlearn_query

LIMIT, ENGINE, LOOP = "forward + backward", "engine", "loop"
SIZE, DAMPING, TRACKS = 1e-2, 0.1, 1000
BELOW = 1e-4  # relative error of an update in float32


def main() -> int:
    """Measure, write, print; 1 where an update is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 512, 2048], help="of the model")
    parser.add_argument("--width", type=int, default=512, help="of the DiT (512)")
    parser.add_argument("--depth", type=int, default=2, help="its layers (2)")
    parser.add_argument("--draws", type=int, default=16, help="of the step (16)")
    args = arguments(parser, "unlearn")
    if args.quick:
        args.frames, args.width, args.depth, args.draws = [32], 64, 1, 4
    started, rows = record.environment(), []
    for frames in args.frames:
        rows += measure(frames, args.width, args.depth, args.draws, args.repeat)
    found = record.result(
        "unlearn", (__doc__ or "").splitlines()[0], args.threads, rows, (LIMIT, LOOP), started,
        settings={"width": args.width, "depth": args.depth, "draws": args.draws, "repeat": args.repeat},
        limits=limits.measure([r["widest"] for r in rows if "widest" in r], args.repeat), columns=["rows", "gflop_per_s"],
    )  # fmt: skip
    return record.finish(found, args.out)


def measure(frames: int, width: int, depth: int, draws: int, repeat: int) -> list[record.Row]:
    """Rows of one length; what is wrong is not timed."""
    case = Case(frames, width, depth, tracks=1)
    fisher, together = case.fisher(), case.rows_a_pass()
    ready = case.noised([(0, d) for d in range(draws)], "update", together)
    ways = {
        LIMIT: partial(case.backward, ready),
        ENGINE: partial(step, case, fisher, draws, together),
        LOOP: partial(loop, case, fisher, draws),
    }
    wanted = loop(Case(frames, width, depth, 1, dtype=torch.float64), fisher, draws)
    kinds = {LIMIT: "limit", ENGINE: "ours", LOOP: "peer"}
    name = f"{frames} frames, {draws} draws"
    rows = [record.row(name, way, kinds[way], rows=1 if way == LOOP else together) for way in ways]
    rows[0]["widest"] = limits.widest(min(together, draws), frames, width)
    for entry in rows:
        if entry["way"] != LIMIT:
            record.checked(entry, off(ways[entry["way"]](), wanted), BELOW)
    record.take_turns(rows, ways, repeat)
    flops = draws * case.size.flops()["forward + backward"]
    for entry in rows:
        if entry["seconds"]:
            entry["gflop_per_s"] = flops / statistics.median(entry["seconds"]) / 1e9
    return rows


def step(case: Case, fisher: Fisher, draws: int, together: int) -> dict[str, Tensor]:
    """The engine's update."""
    more = {"draws": draws, "damping": DAMPING, "rows": together}
    return dict(unlearn_query(case.model, case.tracks, 0, fisher, PLAN, TRACKS, SIZE, **more).delta)


def loop(case: Case, fisher: Fisher, draws: int) -> dict[str, Tensor]:
    """The same, one draw at a time: ``Delta = s |theta| / |u| u``, ``u = (F + damping mean F)^-1 mean grad L``."""
    parameters = list(case.parameters.values())
    mean = [torch.zeros_like(p) for p in parameters]
    for d in range(draws):
        noised = noised_rows(case.model, case.batch, [(0, d)], PLAN, "update", True)
        gradient = torch.autograd.grad(losses(case.model, noised).sum(), parameters)
        for total, g in zip(mean, gradient, strict=True):
            total.add_(g, alpha=1.0 / draws)
    unit = DAMPING * fisher.mean()
    direction = [
        g / (fisher.values[n].to(g.dtype) + unit) for n, g in zip(case.parameters, mean, strict=True)
    ]
    scale = SIZE * math.sqrt(sum(float(p.detach().double().square().sum()) for p in parameters))
    scale /= math.sqrt(sum(float(u.double().square().sum()) for u in direction))
    return {n: scale * u for n, u in zip(case.parameters, direction, strict=True)}


def off(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm, the largest over parameters."""
    worst = 0.0
    for name, w in wanted.items():
        distance, size = float((found[name].double() - w).norm()), float(w.norm())
        here = distance / size if size else (math.inf if distance else 0.0)
        worst = max(worst, here if here == here else math.inf)
    return worst


if __name__ == "__main__":
    sys.exit(main())
